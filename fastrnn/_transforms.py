"""The fused stack under torch.func's transforms and forward-mode AD.

The ops know the transforms themselves (csrc/vmap.cpp, derivatives.cpp), but not under autocast:
that is done here, where the modules come while a transform is active.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

ops = torch.ops.fastrnn

MaybeTensor = Tensor | None


@dataclass(frozen=True)
class Options:
    """The arguments of the ops that are not tensors, as in csrc/stack.h."""

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
        *dropout: Any,
    ) -> Any:
        """Calls `op` on `tensors`, x, h0, c0 and the weights, and on what it takes of dropout."""
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
            *dropout,
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
    masks: MaybeTensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack as the op `fastrnn::recurrent` does, and is seen by every transform."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break()  # what follows runs, and is not traced
    options = Options(mode, num_layers, has_biases, bidirectional, batch_first)
    if batch_sizes is not None:
        batch_sizes = _unwrapped(batch_sizes)
    return _run_any(options, batch_sizes, (x, h0, c0, *weights), masks, dropout)


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
    _, h, c = _run_any(options, None, (x.unsqueeze(0), h0, c0, *weights), is_cell=True)
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
    masks: MaybeTensor = None,
    dropout: float = 0.0,
    is_cell: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack, and as csrc/autocast.cpp does where autocast is on."""
    x, _, c0, *weights = tensors
    assert x is not None
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

        def lower(t: MaybeTensor) -> MaybeTensor:
            return t if t is None or t.dtype == torch.float64 else t.to(dtype)

        with torch.autocast(device, enabled=False):
            lowered = [*map(lower, tensors)]
            outputs = _run_any(options, batch_sizes, lowered, masks, dropout)
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
    options.call(ops.check.default, sizes, tensors)
    return options.call(ops.recurrent.default, batch_sizes, tensors, masks, dropout)
