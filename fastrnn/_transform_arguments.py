"""Arguments of the ops as transforms take them: apart, by sample, or as one folded batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

MaybeTensor = Tensor | None
MaybeDim = int | None


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
        *rest: Any,
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
            *rest,
        )


def as_list(batch_sizes: MaybeTensor) -> list[int] | None:
    """Returns sizes as numbers, or None."""
    return None if batch_sizes is None else batch_sizes.tolist()


@dataclass(frozen=True)
class Needs:
    """Which of some arguments are to be differentiated."""

    of: tuple[bool, ...]

    def spread(self, gradients: Iterable[Tensor]) -> list[MaybeTensor]:
        """Returns `gradients` in the places of those arguments, None in the others."""
        rest = iter(gradients)
        return [next(rest) if need else None for need in self.of]

    def restrict(
        self, function: Callable[..., Any], arguments: Sequence[MaybeTensor]
    ) -> tuple[list[MaybeTensor], Callable[..., Any]]:
        """Returns those arguments, and `function` as a function of them alone."""

        def restricted(*chosen: Tensor) -> Any:
            pairs = zip(self.spread(chosen), arguments, self.of, strict=True)
            return function(*(mine if need else other for mine, other, need in pairs))

        pairs = zip(arguments, self.of, strict=True)
        return [argument for argument, need in pairs if need], restricted


def samples(
    tensors: Sequence[MaybeTensor], dims: Sequence[MaybeDim], count: int
) -> Iterable[tuple[MaybeTensor, ...]]:
    """Returns the arguments of each of vmap's `count` samples."""
    columns = (
        (tensor,) * count if tensor is None or dim is None else tensor.unbind(dim)
        for tensor, dim in zip(tensors, dims, strict=True)
    )
    return zip(*columns, strict=True)


class Fold:
    """vmap's samples (V) folded into the batch, so that one fused run serves them all.

    Row n of sample v becomes row n * V + v: the rows of a step of a packed sequence stay its first.
    """

    def __init__(
        self,
        options: Options,
        batch_sizes: MaybeTensor,
        x: MaybeTensor,
        dim: MaybeDim,
        count: int,
    ) -> None:
        assert x is not None
        packed = batch_sizes is not None
        self.batched = packed or x.dim() - (dim is not None) == 3
        self.count = count
        # The batch dimension of x and y; of states it is the second.
        self.axis = 0 if packed or (self.batched and options.batch_first) else 1
        self.options = options if self.batched else replace(options, batch_first=False)
        self.batch_sizes = None if batch_sizes is None else batch_sizes * count

    def inputs(self, tensors: Sequence[MaybeTensor], dims: Sequence[MaybeDim]) -> list[MaybeTensor]:
        """Folds a sequence and two states, the first of `tensors`; the rest are weights."""
        axes = (self.axis, 1, 1)
        folded = [self.join(*each) for each in zip(tensors, dims, axes, strict=False)]
        return [*folded, *tensors[3:]]

    def join(self, tensor: MaybeTensor, dim: MaybeDim, axis: int) -> MaybeTensor:
        """Returns a tensor whose rows are along `axis`, with those of all samples."""
        if tensor is None:
            return None
        place = axis + self.batched
        if dim is None:
            sizes = tensor.shape
            moved = tensor.unsqueeze(place).expand(*sizes[:place], self.count, *sizes[place:])
        else:
            moved = tensor.movedim(dim, place)
        return moved.flatten(axis, place)

    def split(self, tensor: Tensor, axis: int) -> tuple[Tensor, int]:
        """Returns a result with its samples apart, and their dimension."""
        if not self.batched:
            return tensor, axis
        sizes = tensor.shape
        rows = sizes[axis] // self.count
        return tensor.view(*sizes[:axis], rows, self.count, *sizes[axis + 1 :]), axis + 1
