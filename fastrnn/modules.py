"""Drop-in replacements for torch.nn.RNN and torch.nn.LSTM."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence

from fastrnn import _direct, _transforms
from fastrnn._fused import (
    REFUSALS,
    NameOfClass,
    call_op,
    can_fuse,
    fx_traces,
    is_refusal,
    refuse_script,
    torch_forward,
    unpack,
    weights_of,
)

__all__ = ["LSTM", "RNN"]

_fused_run = torch.ops.fastrnn.recurrent.default


_READ_BY_NAME = (
    "fastrnn reads weights by name at every call: "
    "set weight_ih_l0 and the others, not _flat_weights"
)


class _Weights(list[Tensor | None]):
    """A module's weights; torch.nn computes with what is written to such a list of its own."""

    def __setitem__(self, *_: Any) -> None:
        raise AttributeError(_READ_BY_NAME)


_Weights.__name__ = "list"  # as torch's errors call the type of an argument


def check_flat_weights(
    module: nn.RNNBase, weights: list[Tensor | None], set_later: bool = False
) -> None:
    """Checks that `weights` are those that `module` has by name.

    Args:
        module: The module.
        weights: Those with which torch.nn would compute.
        set_later: Whether `module` may lack a name for now; without it, its next call raises.

    Raises:
        AttributeError: They are others.
    """

    def may_be(name: str, weight: Tensor | None) -> bool:
        if name in module._parameters:
            return module._parameters[name] is weight
        # What is no parameter is set or, by a parametrization, computed for each call.
        return weight is None or set_later or hasattr(module, name)

    names = module._flat_weights_names
    if len(names) != len(weights) or not all(map(may_be, names, weights)):
        raise AttributeError(_READ_BY_NAME)


class _Recurrent(nn.RNNBase):
    """What RNN and LSTM share: parameters from torch.nn.RNNBase, computation in one fused op.

    A subclass of RNNBase and not of nn.RNN or nn.LSTM, which torch.compile refuses to trace.
    """

    # torch.nn's own module, run where the fused op does not apply.
    _torch_class: type[nn.RNNBase]

    __name__ = NameOfClass()
    __prepare_scriptable__ = refuse_script

    # The weights are read at every call, so nothing has to be kept in step with the parameters.
    @property  # type: ignore[override]
    def _flat_weights(self) -> list[Tensor | None]:
        weights = [getattr(self, name, None) for name in self._flat_weights_names]
        return weights if is_dynamo_compiling() else _Weights(weights)

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """Takes the weights that torch.nn's methods set, which are those that it has by name.

        Raises:
            AttributeError: They are others, which torch.nn would compute with.
        """
        check_flat_weights(self, weights)

    def __setattr__(self, name: str, value: Any) -> None:
        """Past RNNBase's, which keeps the list in step."""
        nn.Module.__setattr__(self, name, value)


def _run(
    module: _Recurrent,
    x: Any,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Runs the fused op: y, h_n, c_n; or None where torch.nn is to compute.

    Raises:
        RuntimeError: The op does not take these arguments.
    """
    if module.training and module.dropout != 0 and masks is None and module.num_layers > 1:
        return _run_with_dropout(module, x, batch_sizes, h0, c0)
    dropout = 0.0 if masks is None else float(module.dropout)
    if not (is_dynamo_compiling() or fx_traces()):
        outputs = _direct.recurrent(module.__dict__, x, batch_sizes, h0, c0, masks, dropout)
        if outputs is not NotImplemented:
            return outputs
    if not can_fuse(x, h0, c0):
        return None
    take_over = _transforms.take_over(packed=batch_sizes is not None)
    run = _transforms.recurrent if take_over else _fused_run
    return call_op(
        run,
        module.mode,
        x,
        batch_sizes,
        h0,
        c0,
        weights_of(module, module._flat_weights_names),
        module.num_layers,
        module.bias,
        module.bidirectional,
        module.batch_first,
        masks,
        dropout,
    )


def _run_with_dropout(
    module: _Recurrent,
    x: Any,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `_run`. What raises leaves a CPU's generator as it was, for torch.nn may draw anew."""
    if not can_fuse(x, h0, c0):
        return None
    before = torch.get_rng_state() if x.is_cpu and not is_dynamo_compiling() else None
    try:
        return _run(module, x, batch_sizes, h0, c0, _draw_masks(module, x, batch_sizes))
    except REFUSALS:
        if before is not None:
            torch.set_rng_state(before)
        raise


def _draw_masks(module: _Recurrent, x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """Draws what dropout keeps of the output of each layer but the last, as the op takes it.

    Under the same seed they are torch.nn's.

    Raises:
        ValueError: The probability of dropout is none.
    """
    dropout, count = module.dropout, module.num_layers - 1
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    batch_first = module.batch_first and batch_sizes is None and x.dim() == 3
    if not is_dynamo_compiling():
        masks = _direct.draw_masks(x, batch_first, count, width, dropout)
        if masks is not NotImplemented:
            return masks
    sizes = (*(x.shape[1::-1] if batch_first else x.shape[:-1]), width)
    if dropout == 1:
        return torch.zeros(count, *sizes, dtype=torch.bool, device=x.device)
    ones = torch.ones(sizes, device=x.device)
    # An op that compilers know to draw at random, and that heeds the randomness of vmap. (The mask
    # that it returns beside is no bool under vmap, nor of no elements.)
    drawn = [torch.native_dropout(ones, dropout, True)[0] for _ in range(count)]
    return torch.stack(drawn) != 0


def _torch_takes_over(module: _Recurrent, error: Exception, given: Any, hx: Any) -> bool:
    """Whether torch.nn is to answer for what `error`, raised by the fused path, complains of.

    Not for what its LSTM does not check but reads past: weights of a wrong shape in oneDNN, its
    kernels for all dtypes but float64, and sizes of packed input.
    """
    if module.mode == "LSTM" and str(error).startswith("fastrnn:"):
        packed = isinstance(given, PackedSequence)
        x = given.data if packed else given
        # torch.nn comes to states after the first of the batch sizes.
        if packed and len(given.batch_sizes) > 0 and _torch_reads_past(hx):
            return False
        if packed and "must have size" in str(error) and _torch_takes_onednn(module, given):
            return False
        if str(error).startswith("fastrnn: weight") and x.size(-1) == module.input_size:
            return bool(x.dtype == torch.float64)
    return is_refusal(error)


def _torch_takes_onednn(module: _Recurrent, packed: PackedSequence) -> bool:
    """Whether torch.nn.LSTM runs oneDNN's kernels, which check no size, on a packed sequence.

    They take sequences of one length; others go step by step, where wrong sizes raise.
    """
    x = packed.data
    if not x.is_cpu or x.dtype == torch.float64 or module.proj_size > 0:
        return False
    return torch._C._get_mkldnn_enabled() and _transforms.of_one_length(packed.batch_sizes)


def _torch_reads_past(hx: Any) -> bool:
    """Whether torch.nn.LSTM, which checks no state of packed input, would read past these."""
    if not isinstance(hx, (tuple, list)) or not all(isinstance(state, Tensor) for state in hx):
        return False
    dims = [state.dim() for state in hx]
    return max(dims) > 3 or (dims == [3, 3] and hx[1].size(0) < hx[0].size(0))


def _repack(y: Tensor, packed: PackedSequence) -> PackedSequence:
    return PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def _forward(module: _Recurrent, given: Any, hx: Any) -> Any:
    """A module's forward, of an RNN or an LSTM."""
    try:
        if not (is_dynamo_compiling() or fx_traces()):
            result = _direct.forward(module.__dict__, given, hx)
            if result is not NotImplemented:
                return result
        packed = isinstance(given, PackedSequence)
        x, batch_sizes = (given.data, given.batch_sizes) if packed else (given, None)
        states = (
            module.permute_hidden(hx, given.sorted_indices) if packed and hx is not None else hx
        )
        lstm = module.mode == "LSTM"
        h0, c0 = unpack(states) if lstm else (states, None)
        outputs = _run(module, x, batch_sizes, h0, c0)
        if outputs is not None:
            y, h_n, c_n = outputs
            final: Any = (h_n, c_n) if lstm else h_n
            if not packed:
                return y, final
            return _repack(y, given), module.permute_hidden(final, given.unsorted_indices)
    except REFUSALS as error:
        if not _torch_takes_over(module, error, given, hx):
            raise
    return torch_forward(module._torch_class, module, given, hx)


class RNN(_Recurrent):
    """Elman RNN: a drop-in for torch.nn.RNN.

    Takes what torch.nn.RNN takes, has its parameters, names and initial values, and gives its
    results up to rounding. On a CPU, and on a GPU in a build with CUDA, whole sequences run in
    fused kernels (float32, float64, bfloat16, float16), under torch.compile, autocast or the
    transforms of torch.func too. Other dtypes and devices are left to torch.nn's own
    implementation.

    `isinstance(module, torch.nn.RNN)` is False; `isinstance(module, torch.nn.RNNBase)` is True.

    Args:
        input_size: Features of the input, I.
        hidden_size: Features of the state, H.
        num_layers: Stacked layers, L. Default: 1.
        nonlinearity: "tanh" or "relu". Default: "tanh".
        bias: Whether the layers have bias_ih and bias_hh. Default: True.
        batch_first: Whether batched input and output are (N, T, ...) and not (T, N, ...). Default:
            False.
        dropout: Probability of dropout on the output of each layer but the last, in training.
            Default: 0.
        bidirectional: Whether a second direction reads the sequence backwards (D = 2). Default:
            False.
        device: The device of the parameters. Default: torch's.
        dtype: The dtype of the parameters. Default: torch's.

    Raises:
        ValueError, TypeError: as torch.nn.RNN does.

    Source: Elman (1990), "Finding structure in time"; equations as in torch.nn.RNN.

    Example:
        >>> rnn = fastrnn.RNN(5, 8, batch_first=True)
        >>> output, h_n = rnn(torch.randn(1, 10, 5))
        >>> output.shape, h_n.shape
        (torch.Size([1, 10, 8]), torch.Size([1, 1, 8]))
    """

    _torch_class = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **refused: Any,
    ) -> None:
        """See the class; refuses proj_size as torch.nn.RNN does."""
        if "proj_size" in refused:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **refused,
        )

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:  # noqa: A002
        """Runs the RNN over whole sequences.

        Args:
            input: (T, N, I), or (N, T, I) with batch_first, or (T, I) for one sequence, or a
                PackedSequence.
            hx: Initial state, (L * D, N, H), or (L * D, H) for one sequence; zeros if None.

        Returns:
            Output, (T, N, D * H), in the layout of the input, and the final state h_n, like hx.

        Raises:
            RuntimeError, ValueError, AttributeError, IndexError, TypeError: what torch.nn.RNN
                raises, in its words.
        """
        return _forward(self, input, hx)


class LSTM(_Recurrent):
    """Long short-term memory: a drop-in for torch.nn.LSTM.

    Takes what torch.nn.LSTM takes, has its parameters, names and initial values, and gives its
    results up to rounding. On a CPU, and on a GPU in a build with CUDA, whole sequences run in
    fused kernels (float32, float64, bfloat16, float16), under torch.compile, autocast or the
    transforms of torch.func too. Other dtypes and devices are left to torch.nn's own
    implementation.

    `isinstance(module, torch.nn.LSTM)` is False; `isinstance(module, torch.nn.RNNBase)` is True.

    Args:
        input_size: Features of the input, I.
        hidden_size: Features of the cell state, H.
        num_layers: Stacked layers, L. Default: 1.
        bias: Whether the layers have bias_ih and bias_hh. Default: True.
        batch_first: Whether batched input and output are (N, T, ...) and not (T, N, ...). Default:
            False.
        dropout: Probability of dropout on the output of each layer but the last, in training.
            Default: 0.
        bidirectional: Whether a second direction reads the sequence backwards (D = 2). Default:
            False.
        proj_size: Features of the projected state, P; 0 for no projection (P = H). Default: 0.
        device: The device of the parameters. Default: torch's.
        dtype: The dtype of the parameters. Default: torch's.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM does.

    Source: Hochreiter & Schmidhuber (1997); projection, Sak et al. (2014); equations as in
    torch.nn.LSTM.

    Example:
        >>> lstm = fastrnn.LSTM(5, 8, num_layers=2, batch_first=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(1, 10, 5))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([1, 10, 8]), torch.Size([2, 1, 8]), torch.Size([2, 1, 8]))
    """

    _torch_class = nn.LSTM

    # torch.nn.LSTM's own, which torch.nn.LSTM.forward and PackedSequence need of self.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:  # noqa: A002
        """Runs the LSTM over whole sequences.

        Args:
            input: (T, N, I), or (N, T, I) with batch_first, or (T, I) for one sequence, or a
                PackedSequence.
            hx: Initial states h_0 (L * D, N, P) and c_0 (L * D, N, H), both without N for one
                sequence; zeros if None.

        Returns:
            Output, (T, N, D * P), in the layout of the input, and the final states (h_n, c_n),
            like hx.

        Raises:
            RuntimeError, ValueError, AttributeError, IndexError, TypeError: what torch.nn.LSTM
                raises, in its words.
            RuntimeError: beginning with "fastrnn:", for weights, packed input and states that
                torch.nn.LSTM would read past.
        """
        return _forward(self, input, hx)
