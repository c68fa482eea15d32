"""The fused stack under torch.func's transforms and forward-mode AD.

Eager and compiled code calls the registered op, whose C++ autograd these transforms do not take.
While one of them is active the modules come here instead, to torch.autograd.Functions with a rule
for each transform. Forward and backward stay fused; tangents, and gradients of gradients, come from
the differentiable op `fastrnn::reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function, forward_ad
from torch.nn.functional import dropout as drop

ops = torch.ops.fastrnn

MaybeTensor = Tensor | None
MaybeDim = int | None


def active() -> bool:
    """Returns whether a transform of torch.func or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def take_over(packed: bool = False) -> bool:
    """Returns whether a call comes here: where a transform is active.

    Not while torch.compile traces, which cannot follow what is done here: the op fastrnn::recurrent
    shows it plain steps then. Those of a packed sequence depend on sizes that only a run knows: a
    call on one is left out of the graph, and comes here when that runs.
    """
    return active() and (packed or not torch.compiler.is_dynamo_compiling())


def functionalizing() -> bool:
    """Returns whether torch.func.functionalize, which takes no autograd.Function, is active."""
    key = _functorch.TransformType.Functionalize
    return any(level.key() == key for level in _functorch.get_interpreter_stack() or ())


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
    tensors = (x, h0, c0, *weights)
    options.call(ops.check.default, _sizes(batch_sizes), tensors, dropout)
    if dropout > 0:
        return _run_with_dropout(options, batch_sizes, tensors, dropout)
    return _run(options, batch_sizes, tensors)


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
    sequence = x.unsqueeze(0)
    _, h, c = recurrent(mode, sequence, None, h0, c0, weights, 1, has_biases, False, False, 0.0)
    return h.squeeze(0), c.squeeze(0)  # an RNN's c, which is empty, stays as it is


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


def _unwrapped(batch_sizes: Tensor) -> Tensor:
    """Sizes are data: no transform acts on them, though it may have wrapped them."""
    while _functorch.is_functorch_wrapped_tensor(batch_sizes):
        batch_sizes = _functorch.get_unwrapped(batch_sizes)
    return batch_sizes


def _sizes(batch_sizes: MaybeTensor) -> list[int] | None:
    return None if batch_sizes is None else batch_sizes.tolist()


def _run(
    options: Options, batch_sizes: MaybeTensor, tensors: Sequence[MaybeTensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack without dropout under whatever transforms are active."""
    if not active():
        return options.call(ops.recurrent.default, batch_sizes, tensors, 0.0)
    innermost = _functorch.peek_interpreter_stack()
    if innermost is not None and innermost.key() == _functorch.TransformType.Vmap:
        return _run_under_vmap(innermost, options, batch_sizes, tensors)
    return _Forward.apply(options, batch_sizes, *tensors)[:3]


def _run_under_vmap(
    interpreter: _functorch.CInterpreter,
    options: Options,
    batch_sizes: MaybeTensor,
    tensors: Sequence[MaybeTensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch makes of `_Forward.vmap` where vmap is innermost, at a third of the cost."""
    vmap = _functorch.CVmapInterpreterPtr(interpreter)
    level, count = vmap.level(), vmap.batchSize()
    unwrapped = [(t, None) if t is None else _functorch._unwrap_batched(t, level) for t in tensors]
    values, dims = zip(*unwrapped, strict=True)
    layer = _functorch.pop_dynamic_layer_stack()
    try:
        outputs, out_dims = _run_samples(options, batch_sizes, values, dims, count)
    finally:
        _functorch.push_dynamic_layer_stack(layer)
    y, h_n, c_n = (
        output if dim is None else _functorch._add_batch_dim(output, dim, level)
        for output, dim in zip(outputs, out_dims, strict=True)
    )
    return y, h_n, c_n


def _run_samples(
    options: Options,
    batch_sizes: MaybeTensor,
    tensors: Sequence[MaybeTensor],
    dims: Sequence[MaybeDim],
    count: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[MaybeDim, ...]]:
    """Runs vmap's `count` samples: outputs, and the dimension of the samples in each."""
    if all(dim is None for dim in dims):
        return _run(options, batch_sizes, tensors), (None, None, None)
    if count == 0:  # none of what one sample of zeros gives
        sample = [
            t if t is None or dim is None else t.sum(dim)
            for t, dim in zip(tensors, dims, strict=True)
        ]
        y, h_n, c_n = (o.unsqueeze(0)[:0] for o in _run(options, batch_sizes, sample))
        return (y, h_n, c_n), (0, 0, 0)
    if any(dim is not None for dim in dims[3:]):
        runs = [_run(options, batch_sizes, sample) for sample in _samples(tensors, dims, count)]
        y, h_n, c_n = map(torch.stack, zip(*runs, strict=True))
        return (y, h_n, c_n), (0, 0, 0)
    fold = Fold(options, batch_sizes, tensors[0], dims[0], count)
    y, h_n, c_n = _run(fold.options, fold.batch_sizes, fold.inputs(tensors, dims))
    y, y_dim = fold.split(y, fold.axis)
    h_n, h_dim = fold.split(h_n, 1)
    c_n, c_dim = fold.split(c_n, 1) if options.mode == "LSTM" else (c_n, None)
    return (y, h_n, c_n), (y_dim, h_dim, c_dim)


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
        layer_weights = weights[layer * count : (layer + 1) * count]
        x, *states = _run(layer_options, batch_sizes, (x, h, c, *layer_weights))
        final.append(states)
    h_n, c_n = (torch.cat(states) for states in zip(*final, strict=True))
    return (x.transpose(0, 1) if swaps else x), h_n, c_n


class _Forward(Function):
    """Outputs y, h_n, c_n, and what backward reads: the reserve, and y as it was.

    Both are empty where vmap had to rearrange them.
    """

    @staticmethod
    def forward(options: Options, batch_sizes: MaybeTensor, *tensors: MaybeTensor) -> Any:
        outputs = options.call(ops.recurrent_forward.default, batch_sizes, tensors, 0.0)
        return (*outputs, outputs[0].clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.batch_sizes, *tensors = inputs
        *_, reserve, y = output
        ctx.mark_non_differentiable(reserve, y)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, reserve, *tensors)
        ctx.save_for_forward(y, reserve, *tensors)

    @staticmethod
    def backward(
        ctx: Any, dy: MaybeTensor, dh_n: MaybeTensor, dc_n: MaybeTensor, *_: MaybeTensor
    ) -> Any:
        y, reserve, *tensors = ctx.saved_tensors
        needs = Needs(tuple(ctx.needs_input_grad[2:]))
        gradients = _Backward.apply(
            ctx.options, needs, ctx.batch_sizes, y, reserve, dy, dh_n, dc_n, *tensors
        )
        return (None, None, *needs.spread(gradients))

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> Any:
        _, _, *tensors = ctx.saved_tensors
        return (*_push_forward(_reference(ctx), tensors, tangents[2:]), None, None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        options: Options,
        batch_sizes: MaybeTensor,
        *tensors: MaybeTensor,
    ) -> Any:
        outputs, out_dims = _run_samples(
            options, batch_sizes, tensors, in_dims[2:], info.batch_size
        )
        empty = outputs[0].new_empty(0)
        return (*outputs, empty, empty.clone()), (*out_dims, None, None)


class _Backward(Function):
    """Gradients of those of x, h0, c0 and the weights that are needed, in this order."""

    @staticmethod
    def forward(
        options: Options,
        needs: Needs,
        batch_sizes: MaybeTensor,
        y: Tensor,
        reserve: Tensor,
        dy: MaybeTensor,
        dh_n: MaybeTensor,
        dc_n: MaybeTensor,
        *tensors: MaybeTensor,
    ) -> tuple[Tensor, ...]:
        if y.numel() == 0:
            y, *_, reserve = options.call(ops.recurrent_forward.default, batch_sizes, tensors, 0.0)

        def op(mode: str, *arguments: Any) -> list[Tensor]:
            first, rest = arguments[:5], arguments[5:]
            return ops.recurrent_backward.default(
                mode, dy, dh_n, dc_n, *first, y, reserve, *rest, 0.0, list(needs.of)
            )

        return tuple(options.call(op, batch_sizes, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.needs, ctx.batch_sizes, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        needs = Needs(tuple(ctx.needs_input_grad[5:]))
        chosen, function = needs.restrict(_reference_gradients(ctx), ctx.saved_tensors)
        pull = torch.func.vjp(function, *chosen)[1]
        return (None, None, None, None, None, *needs.spread(pull(cotangents)))

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> Any:
        return _push_forward(_reference_gradients(ctx), ctx.saved_tensors, tangents[5:])

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        options: Options,
        needs: Needs,
        batch_sizes: MaybeTensor,
        y: Tensor,
        reserve: Tensor,
        *tensors: MaybeTensor,
    ) -> Any:
        dims = in_dims[5:]
        if info.batch_size == 0:  # the Jacobian of nothing
            empty = tuple(
                t.new_empty(0, *t.shape) if dim is None else t.movedim(dim, 0)
                for t, dim, need in zip(tensors[3:], dims[3:], needs.of, strict=True)
                if need and t is not None
            )
            return empty, (0,) * len(empty)
        if any(needs.of[3:]) or any(dim is not None for dim in dims[6:]):
            # A weight has a gradient for each sample, or is another for each.
            samples = _samples((y, reserve, *tensors), in_dims[3:], info.batch_size)
            runs = [_Backward.apply(options, needs, batch_sizes, *sample) for sample in samples]
            stacked = tuple(map(torch.stack, zip(*runs, strict=True)))
            return stacked, (0,) * len(stacked)
        fold = Fold(options, batch_sizes, tensors[3], dims[3], info.batch_size)
        gradients = _Backward.apply(
            fold.options,
            needs,
            fold.batch_sizes,
            y.new_empty(0),
            reserve,
            *fold.inputs(tensors[:3], dims[:3]),
            *fold.inputs(tensors[3:], dims[3:]),
        )
        axes = [axis for axis, need in zip((fold.axis, 1, 1), needs.of, strict=False) if need]
        results = [fold.split(*pair) for pair in zip(gradients, axes, strict=True)]
        return tuple(result for result, _ in results), tuple(dim for _, dim in results)


def _reference(ctx: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What the forward pass computes, as a differentiable function of the tensors."""
    return lambda *tensors: ctx.options.call(
        ops.reference.default, _sizes(ctx.batch_sizes), tensors
    )


def _reference_gradients(ctx: Any) -> Callable[..., tuple[Tensor, ...]]:
    """What _Backward computes, as a differentiable function of dy, dh_n, dc_n and the tensors."""

    def gradients(*inputs: MaybeTensor) -> tuple[Tensor, ...]:
        chosen, function = ctx.needs.restrict(_reference(ctx), inputs[3:])
        outputs, pull = torch.func.vjp(function, *chosen)  # type: ignore[misc]
        return pull(
            tuple(
                torch.zeros_like(output) if given is None else given
                for output, given in zip(outputs, inputs[:3], strict=True)
            )
        )

    return gradients


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


def _push_forward(
    function: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[MaybeTensor],
    tangents: Sequence[MaybeTensor],
) -> tuple[Tensor, ...]:
    """Returns the tangents of `function`'s outputs, within the level that is active."""
    with forward_ad._set_fwd_grad_enabled(True):
        duals = []
        for primal, tangent in zip(primals, tangents, strict=True):
            if primal is not None:
                primal = forward_ad.unpack_dual(primal).primal
                if tangent is not None:
                    # A tangent takes its primal's strides, which must not be an expansion's.
                    primal = forward_ad.make_dual(primal.contiguous(), tangent)
            duals.append(primal)
        outputs = [forward_ad.unpack_dual(output) for output in function(*duals)]
        return tuple(
            torch.zeros_like(output.primal) if output.tangent is None else output.tangent
            for output in outputs
        )


def _samples(
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
        folded = [self._join(*each) for each in zip(tensors, dims, axes, strict=False)]
        return [*folded, *tensors[3:]]

    def _join(self, tensor: MaybeTensor, dim: MaybeDim, axis: int) -> MaybeTensor:
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
