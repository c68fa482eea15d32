"""Shapes of the ops' results, for torch.compile, torch.export and FakeTensorMode.

The ops and their arguments are described in csrc/ops.cpp.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrnn._fused import FUSED_DTYPES

_MODES = ("LSTM", "RNN_TANH", "RNN_RELU")

# The package may be imported twice, which torch 2.10 takes for a mistake otherwise.
_register_fake = partial(torch.library.register_fake, allow_override=True)


def _check_kinds(
    x: Tensor,
    batch_sizes: Tensor | None,
    masks: Tensor | None,
    others: tuple[Tensor | None, ...],
) -> None:
    """Checks devices, of which the dispatcher sends a mixture with meta here, and dtypes."""
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"fastrnn: batch_sizes is on {batch_sizes.device}, not on the CPU")
    if masks is not None and (masks.dtype != torch.bool or masks.device != x.device):
        raise RuntimeError(f"fastrnn: masks must be of bool on {x.device}")
    for tensor in others:
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise RuntimeError(f"fastrnn: x is on {x.device}, another input on {tensor.device}")
        if tensor.dtype != x.dtype:
            raise RuntimeError(f"fastrnn: x is {x.dtype}, another input {tensor.dtype}")


def _differ(sizes: Any, others: Any) -> bool:
    """Returns whether sizes differ, of which some may be open: as far as they are numbers."""
    numbers = (pair for pair in zip(sizes, others, strict=True) if {int} == {*map(type, pair)})
    return any(size != other for size, other in numbers)


def _check_size(name: str, tensor: Tensor, size: tuple[int | torch.SymInt, ...]) -> None:
    if tensor.dim() != len(size) or _differ(tensor.shape, size):
        raise RuntimeError(f"fastrnn: {name} must have size {size}, got {tuple(tensor.shape)}")


class _Stack:
    """Sizes of a stack; names as in csrc/stack.h. Takes the arguments of `recurrent_forward`."""

    def __init__(
        self,
        mode: str,
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: list[Tensor],
        num_layers: int,
        has_biases: bool,
        bidirectional: bool,
        batch_first: bool,
        masks: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        if mode not in _MODES:
            raise RuntimeError(f"fastrnn: mode must be one of {_MODES}, got {mode}")
        if x is None or x.layout is not torch.strided or x.dtype not in FUSED_DTYPES:
            raise RuntimeError(f"fastrnn: x must be a dense tensor of one of {FUSED_DTYPES}")
        _check_kinds(x, batch_sizes, masks, (h0, c0, *weights))
        if x.dim() != 2 and (x.dim() != 3 or batch_sizes is not None):
            raise RuntimeError(f"fastrnn: x must have 2 or 3 dimensions, got {x.dim()}")
        self.x = x
        self.layers = num_layers
        self.directions = 2 if bidirectional else 1
        self.strands = num_layers * self.directions
        self.lstm = mode == "LSTM"
        if c0 is not None and not self.lstm:
            raise RuntimeError("fastrnn: only an LSTM has c0")
        unprojected_count = self.strands * (4 if has_biases else 2)
        self.projected = self.lstm and len(weights) == unprojected_count + self.strands
        if num_layers < 1 or len(weights) != unprojected_count + self.strands * self.projected:
            raise RuntimeError(f"fastrnn: {num_layers} layers, but {len(weights)} weights")
        if weights[1].dim() != 2:
            raise RuntimeError("fastrnn: weight_hh must have 2 dimensions")
        gates = 4 if self.lstm else 1
        self.hidden = weights[1].size(0) // gates
        self.width = weights[1].size(1)
        self.layer_width = self.width * self.directions
        if 0 in (self.hidden, self.width) or _differ([self.hidden * gates], weights[1].shape[:1]):
            raise RuntimeError(
                f"fastrnn: weight_hh must have {gates} rows for each unit, and columns, got size "
                f"{tuple(weights[1].shape)}"
            )
        if x.size(-1) == 0:
            raise RuntimeError("fastrnn: x must have features")
        self._check_weights(weights, has_biases)
        self.batch: tuple[int | torch.SymInt, ...] = ()
        if batch_sizes is not None:
            if batch_sizes.dtype != torch.int64:
                # What torch's fake of pack_padded_sequence says, with too few rows of data beside.
                # Not a refusal: torch.nn would raise without a reason.
                raise RuntimeError(
                    "torch does not trace pack_padded_sequence rightly: give what is exported the "
                    "data and the batch sizes, and make the PackedSequence of them inside"
                )
            # Only data tells N: batch_sizes[0].
            self.batch = (torch.library.get_ctx().new_dynamic_size(),)
        elif x.dim() == 3:
            self.batch = (x.size(0 if batch_first else 1),)
        steps = x.size(1 if batch_first and x.dim() == 3 else 0)
        if isinstance(steps, int) and steps == 0:
            raise RuntimeError("fastrnn: x has no steps")
        self.rows = x.numel() // x.size(-1)
        for state, size in zip((h0, c0), (self.width, self.hidden), strict=True):
            if state is None:
                continue
            _check_size("a state", state, (self.strands, *self.batch, size))
        if not 0 <= dropout <= 1:
            raise RuntimeError(f"fastrnn: dropout must be in [0, 1], got {dropout}")
        if masks is not None:
            batch = self.batch if x.dim() == 3 else ()
            _check_size("masks", masks, (num_layers - 1, steps, *batch, self.layer_width))

    def _check_weights(self, weights: list[Tensor], has_biases: bool) -> None:
        gates = self.hidden * (4 if self.lstm else 1)
        count = len(weights) // self.strands
        for strand in range(self.strands):
            is_first = strand < self.directions
            features = self.x.size(-1) if is_first else self.layer_width
            sizes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, features)}
            sizes["weight_hh"] = (gates, self.width)
            if has_biases:
                sizes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
            if self.projected:
                sizes["weight_hr"] = (self.width, self.hidden)
            of_strand = weights[strand * count : (strand + 1) * count]
            for (name, size), weight in zip(sizes.items(), of_strand, strict=True):
                _check_size(name, weight, size)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        y = self.x.new_empty((*self.x.shape[:-1], self.layer_width))
        h_n = self.x.new_empty((self.strands, *self.batch, self.width))
        c_n = self.x.new_empty((self.strands, *self.batch, self.hidden) if self.lstm else (0,))
        return y, h_n, c_n

    def reserve(self) -> Tensor:
        per_strand = 5 * self.hidden if self.lstm else 0
        per_strand += self.hidden if self.projected else 0
        kept = self.strands * per_strand + (self.layers - 1) * self.layer_width
        return self.x.new_empty((self.rows * kept,))


@_register_fake("fastrnn::recurrent")
def _recurrent(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Stack(*arguments, **keywords).outputs()


@_register_fake("fastrnn::recurrent_forward")
def _recurrent_forward(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stack = _Stack(*arguments, **keywords)
    return (*stack.outputs(), stack.reserve())


@_register_fake("fastrnn::recurrent_backward")
def _recurrent_backward(
    mode: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    y: Tensor,
    reserve: Tensor,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    masks: Tensor | None,
    dropout: float,
    needs: list[bool],
    samples: int | None = None,
) -> list[Tensor]:
    inputs = [x, h0, c0, *weights]
    _check_kinds(x, batch_sizes, masks, (dy, dh_n, dc_n, y, reserve, *inputs))
    of_samples = () if samples is None else (samples,)
    return [
        given.new_empty(given.shape if i < 3 else (*of_samples, *given.shape))
        for i, (given, needed) in enumerate(zip(inputs, needs, strict=True))
        if needed and given is not None
    ]


@_register_fake("fastrnn::output_again")
def _output_again(
    mode: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    reserve: Tensor,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    masks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    _check_kinds(x, batch_sizes, masks, (h0, c0, reserve, *weights))
    return x.new_empty((*x.shape[:-1], weights[1].size(1) * (2 if bidirectional else 1)))
