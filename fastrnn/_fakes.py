"""Shapes of the ops' results, for torch.compile, torch.export and FakeTensorMode.

The ops and their arguments are described in csrc/ops.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _check_devices(
    x: Tensor, batch_sizes: Tensor | None, others: tuple[Tensor | None, ...]
) -> None:
    """The dispatcher sends a mixture of meta and other devices here, where it must not pass."""
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"fastrnn: batch_sizes is on {batch_sizes.device}, not on the CPU")
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"fastrnn: x is on {x.device}, another input on {tensor.device}")


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
        dropout: float,
        token: Tensor | None = None,
    ) -> None:
        _check_devices(x, batch_sizes, (h0, c0, *weights))
        if x.dim() != 2 and (x.dim() != 3 or batch_sizes is not None):
            raise RuntimeError(f"fastrnn: x must have 2 or 3 dimensions, got {x.dim()}")
        if x.size(-1) != weights[0].size(1):
            sizes = tuple(weights[0].shape)
            raise RuntimeError(f"fastrnn: weight_ih has size {sizes}, x {x.size(-1)} features")
        self.x = x
        self.dropout = dropout
        self.layers = num_layers
        self.strands = num_layers * (2 if bidirectional else 1)
        self.layer_width = weights[1].size(1) * (2 if bidirectional else 1)
        self.lstm = mode == "LSTM"
        self.hidden = weights[1].size(0) // (4 if self.lstm else 1)
        self.width = weights[1].size(1)
        unprojected_count = self.strands * (4 if has_biases else 2)
        self.projected = len(weights) == unprojected_count + self.strands
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
        self.rows = x.numel() // x.size(-1)
        for state, size in zip((h0, c0), (self.width, self.hidden), strict=True):
            if state is None:
                continue
            # What lies between them may be known from data alone.
            ends = (state.dim(), state.size(0), state.size(-1))
            if ends != (len(self.batch) + 2, self.strands, size):
                expected = (self.strands, *self.batch, size)
                raise RuntimeError(
                    f"fastrnn: a state has size {tuple(state.shape)}, expected {expected}"
                )

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        y = self.x.new_empty((*self.x.shape[:-1], self.layer_width))
        h_n = self.x.new_empty((self.strands, *self.batch, self.width))
        c_n = self.x.new_empty((self.strands, *self.batch, self.hidden) if self.lstm else (0,))
        return y, h_n, c_n

    def reserve(self) -> Tensor:
        per_strand = 5 * self.hidden if self.lstm else 0
        per_strand += self.hidden if self.projected else 0
        between_layers = self.layer_width * (3 if self.dropout > 0 else 1)
        kept = self.strands * per_strand + (self.layers - 1) * between_layers
        return self.x.new_empty((self.rows * kept,))


@torch.library.register_fake("fastrnn::recurrent")
def _recurrent(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Stack(*arguments, **keywords).outputs()


@torch.library.register_fake("fastrnn::recurrent_forward")
def _recurrent_forward(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stack = _Stack(*arguments, **keywords)
    return (*stack.outputs(), stack.reserve())


@torch.library.register_fake("fastrnn::recurrent_backward")
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
    dropout: float,
    needs: list[bool],
    samples: int | None = None,
) -> list[Tensor]:
    inputs = [x, h0, c0, *weights]
    _check_devices(x, batch_sizes, (dy, dh_n, dc_n, y, reserve, *inputs))
    of_samples = () if samples is None else (samples,)
    return [
        given.new_empty(given.shape if i < 3 else (*of_samples, *given.shape))
        for i, (given, needed) in enumerate(zip(inputs, needs, strict=True))
        if needed and given is not None
    ]


@torch.library.register_fake("fastrnn::output_again")
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
    dropout: float,
) -> Tensor:
    _check_devices(x, batch_sizes, (h0, c0, reserve, *weights))
    return x.new_empty((*x.shape[:-1], weights[1].size(1) * (2 if bidirectional else 1)))
