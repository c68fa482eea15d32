"""The fused stack under torch.func's transforms and forward-mode AD.

The ops know the transforms themselves (csrc/vmap.cpp, derivatives.cpp). What they do not is done
here, where the modules come while a transform is active: autocast, and dropout under vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.functional import dropout as drop

ops = torch.ops.fastrnn

MaybeTensor = Tensor | None


@dataclass(frozen=True)
class Options:
    """The arguments of the ops that are not tensors, as in csrc/stack.h, but for dropout."""

    mode: str
    num_layers: int
    has_biases: bool
    bidirectional: bool
    batch_first: bool

    def call(
        self,
        op: Callable[..., Any],
        batch_sizes: Tensor | list[int] | None,
        tensors: Sequence[MaybeTensor],
        dropout: float,
    ) -> Any:
        """Calls `op` on `tensors`: x, h0, c0 and the weights."""
        x, h0, c0, *weights = tensors
        return op(
            self.mode,
            x,
            batch_sizes,
            h0,
            c0,
            weights,
            self.num_layers,
            self.has_biases,
            self.bidirectional,
            self.batch_first,
            dropout,
        )


def active() -> bool:
    """Returns whether a transform of torch.func or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def take_over(packed: bool = False) -> bool:
    """Returns whether a call comes here: where a transform is active.

    Not while torch.compile traces, which cannot follow what is done here, but only the op
    fastrnn::recurrent itself. The steps of a packed sequence have sizes that only a run knows: a
    call on one is left out of the graph, and comes here when that runs.
    """
    return active() and (packed or not torch.compiler.is_dynamo_compiling())


def recurrent(
    mode: str,
    x: Tensor,
    batch_sizes: MaybeTensor,
    h0: MaybeTensor,
    c0: MaybeTensor,
    weights: list[Tensor],
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack as the op `fastrnn::recurrent` does, and is seen by every transform."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break()  # what follows runs, and is not traced
    options = Options(mode, num_layers, has_biases, bidirectional, batch_first)
    if batch_sizes is not None:
        batch_sizes = _unwrapped(batch_sizes)
    return _run_any(options, batch_sizes, (x, h0, c0, *weights), dropout)


def cell(
    mode: str,
    x: Tensor,
    h0: MaybeTensor,
    c0: MaybeTensor,
    weights: list[Tensor],
    has_biases: bool,
) -> tuple[Tensor, Tensor]:
    """Takes a step as the op `fastrnn::cell` does, and is seen by every transform."""
    if h0 is not None:
        h0 = h0.unsqueeze(0)
    if c0 is not None:
        c0 = c0.unsqueeze(0)
    options = Options(mode, 1, has_biases, bidirectional=False, batch_first=False)
    _, h, c = _run_any(options, None, (x.unsqueeze(0), h0, c0, *weights), 0.0, is_cell=True)
    return h.squeeze(0), c.squeeze(0)  # an RNN's c, which is empty, stays as it is


def of_one_length(batch_sizes: Tensor) -> bool:
    """Returns whether torch.nn takes packed sequences for a padded batch."""
    return batch_sizes.dim() == 1 and len(set(batch_sizes.tolist())) == 1


def _unwrapped(batch_sizes: Tensor) -> Tensor:
    """Sizes are data: no transform acts on them, though it may have wrapped them."""
    while _functorch.is_functorch_wrapped_tensor(batch_sizes):
        batch_sizes = _functorch.get_unwrapped(batch_sizes)
    return batch_sizes


def _run_any(
    options: Options,
    batch_sizes: MaybeTensor,
    tensors: Sequence[MaybeTensor],
    dropout: float,
    is_cell: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack with or without dropout, and as csrc/autocast.cpp does where that is on."""
    x, _, c0, *weights = tensors
    assert x is not None
    device = x.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        lowered = [t if t is None or t.dtype == torch.float64 else t.to(lower) for t in tensors]
        with torch.autocast(device, enabled=False):
            outputs = _run_any(options, batch_sizes, lowered, dropout)
        strands = options.num_layers * (2 if options.bidirectional else 1)
        return ops.autocast_outputs.default(
            options.mode == "LSTM",
            not is_cell and (batch_sizes is None or of_one_length(batch_sizes)),
            len(weights) == strands * (5 if options.has_biases else 3),
            x.dtype,
            (x if c0 is None else c0).dtype,
            *outputs,
        )
    # Raises what recurrent would, before a transform rearranges the arguments.
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    options.call(ops.check.default, sizes, tensors, dropout)
    if dropout > 0:
        return _run_with_dropout(options, batch_sizes, tensors, dropout)
    return options.call(ops.recurrent.default, batch_sizes, tensors, 0.0)


def _run_with_dropout(
    options: Options, batch_sizes: MaybeTensor, tensors: Sequence[MaybeTensor], dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer by layer, with torch's own dropout between them, whose masks follow vmap's randomness.

    Drawn over (T, N, ...) as torch.nn does, so that a seed gives the same masks.
    """
    x, h0, c0, *weights = tensors
    assert x is not None
    swaps = options.batch_first and x.dim() == 3
    if swaps:
        x = x.transpose(0, 1)
    layer_options = replace(options, num_layers=1, batch_first=False)
    directions = 2 if options.bidirectional else 1
    count = len(weights) // options.num_layers
    final = []
    for layer in range(options.num_layers):
        if layer > 0:
            x = drop(x, dropout)
        h, c = (
            None if state is None else state[layer * directions : (layer + 1) * directions]
            for state in (h0, c0)
        )
        of_layer = (x, h, c, *weights[layer * count : (layer + 1) * count])
        x, *states = layer_options.call(ops.recurrent.default, batch_sizes, of_layer, 0.0)
        final.append(states)
    h_n, c_n = (torch.cat(states) for states in zip(*final, strict=True))
    return (x.transpose(0, 1) if swaps else x), h_n, c_n
