"""Drop-in replacements for torch.nn.RNNCell and torch.nn.LSTMCell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

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

__all__ = ["LSTMCell", "RNNCell"]

_fused_step = torch.ops.fastrnn.cell.default

_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
_NAMES = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
_NAMES_WITHOUT_BIAS = _NAMES[:2]


def _step(
    cell: nn.RNNCellBase, mode: str, x: Any, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Runs the fused op: h, c; or None where torch.nn is to compute.

    Raises:
        RuntimeError: The op does not take these arguments.
    """
    parameters = cell._parameters
    # torch.nn's cells ask for the biases, not for cell.bias. A parametrized one is not listed.
    bias_ih, bias_hh = parameters.get("bias_ih", cell), parameters.get("bias_hh", cell)
    has_biases = bias_ih is not None or bias_hh is not None
    names = _NAMES if has_biases else _NAMES_WITHOUT_BIAS
    if not (is_dynamo_compiling() or fx_traces()):
        outputs = _direct.cell(mode, x, h0, c0, parameters, names, has_biases)
        if outputs is not NotImplemented:
            return outputs
    if not can_fuse(x, h0, c0):
        return None
    run = _transforms.cell if _transforms.take_over() else _fused_step
    return call_op(run, mode, x, h0, c0, weights_of(cell, names), has_biases)


class RNNCell(nn.RNNCell):
    """One step of an Elman RNN: a drop-in for torch.nn.RNNCell.

    Takes what torch.nn.RNNCell takes, has its parameters, names and initial values, and gives its
    results up to rounding, from one fused op where `fastrnn.RNN` uses one.

    Args:
        input_size: Features of the input, I.
        hidden_size: Features of the state, H.
        bias: Whether the cell has bias_ih and bias_hh. Default: True.
        nonlinearity: "tanh" or "relu". Default: "tanh".
        device: The device of the parameters. Default: torch's.
        dtype: The dtype of the parameters. Default: torch's.

    Raises:
        TypeError: as torch.nn.RNNCell does.

    Source: Elman (1990), "Finding structure in time"; equations as in torch.nn.RNNCell.

    Example:
        >>> cell = fastrnn.RNNCell(5, 8)
        >>> cell(torch.randn(3, 5)).shape
        torch.Size([3, 8])
    """

    _torch_class = nn.RNNCell

    __name__ = NameOfClass()
    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # noqa: A002
        """Takes one step.

        Args:
            input: (N, I), or (I) for one sequence.
            hx: State before the step, (N, H) or (H); zeros if None.

        Returns:
            State after the step, (N, H) or (H).

        Raises:
            RuntimeError, ValueError, AttributeError, TypeError: what torch.nn.RNNCell raises, in
                its words.
        """
        try:
            mode = _MODES.get(self.nonlinearity, self.nonlinearity)
            outputs = _step(self, mode, input, hx, None)
            if outputs is not None:
                return outputs[0]
        except REFUSALS as error:
            if not is_refusal(error):
                raise
        return torch_forward(self._torch_class, self, input, hx)


class LSTMCell(nn.LSTMCell):
    """One step of an LSTM: a drop-in for torch.nn.LSTMCell.

    Takes what torch.nn.LSTMCell takes, has its parameters, names and initial values, and gives its
    results up to rounding, from one fused op where `fastrnn.LSTM` uses one.

    Args:
        input_size: Features of the input, I.
        hidden_size: Features of the state, H.
        bias: Whether the cell has bias_ih and bias_hh. Default: True.
        device: The device of the parameters. Default: torch's.
        dtype: The dtype of the parameters. Default: torch's.

    Raises:
        TypeError: as torch.nn.LSTMCell does.

    Source: Hochreiter & Schmidhuber (1997); equations as in torch.nn.LSTMCell.

    Example:
        >>> cell = fastrnn.LSTMCell(5, 8)
        >>> h, c = cell(torch.randn(3, 5))
        >>> h.shape, c.shape
        (torch.Size([3, 8]), torch.Size([3, 8]))
    """

    _torch_class = nn.LSTMCell

    __name__ = NameOfClass()
    __prepare_scriptable__ = refuse_script

    def forward(
        self,
        input: Tensor,  # noqa: A002
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes one step.

        Args:
            input: (N, I), or (I) for one sequence.
            hx: States h and c before the step, (N, H) or (H) each; zeros if None.

        Returns:
            States h and c after the step, (N, H) or (H) each.

        Raises:
            RuntimeError, ValueError, AttributeError, TypeError: what torch.nn.LSTMCell raises, in
                its words.
        """
        try:
            outputs = _step(self, "LSTM", input, *unpack(hx))
            if outputs is not None:
                return outputs
        except REFUSALS as error:
            if not is_refusal(error):
                raise
        return torch_forward(self._torch_class, self, input, hx)
