"""The fused stack as torch.autograd.Functions with a rule for each transform of torch.func.

Forward and backward stay fused; tangents, and gradients of gradients, come from the differentiable
op `fastrnn::reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import Function, forward_ad

from fastrnn._transform_arguments import (
    Fold,
    MaybeDim,
    MaybeTensor,
    Needs,
    Options,
    as_list,
    samples,
)

ops = torch.ops.fastrnn


def active() -> bool:
    """Returns whether a transform of torch.func or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(
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
        outputs, out_dims = _run_samples(run, options, batch_sizes, values, dims, count)
    finally:
        _functorch.push_dynamic_layer_stack(layer)
    y, h_n, c_n = (
        output if dim is None else _functorch._add_batch_dim(output, dim, level)
        for output, dim in zip(outputs, out_dims, strict=True)
    )
    return y, h_n, c_n


def _run_samples(
    forward: Callable[..., tuple[Tensor, ...]],
    options: Options,
    batch_sizes: MaybeTensor,
    tensors: Sequence[MaybeTensor],
    dims: Sequence[MaybeDim],
    count: int,
) -> tuple[tuple[Tensor, ...], tuple[MaybeDim, ...]]:
    """Runs vmap's `count` samples: outputs, and the dimension of the samples in each.

    `forward` is `run` or `_run_for_backward`. The reserve of samples that are one batch is theirs
    together, and has no such dimension.
    """
    if all(dim is None for dim in dims):
        outputs = forward(options, batch_sizes, tensors)
        return outputs, (None,) * len(outputs)
    if count == 0:  # none of what one sample of zeros gives
        sample = [
            t if t is None or dim is None else t.sum(dim)
            for t, dim in zip(tensors, dims, strict=True)
        ]
        outputs = tuple(o.unsqueeze(0)[:0] for o in forward(options, batch_sizes, sample))
        return outputs, (0,) * len(outputs)
    if any(dim is not None for dim in dims[3:]):
        runs = [forward(options, batch_sizes, sample) for sample in samples(tensors, dims, count)]
        outputs = tuple(map(torch.stack, zip(*runs, strict=True)))
        return outputs, (0,) * len(outputs)
    fold = Fold(options, batch_sizes, tensors[0], dims[0], count)
    y, h_n, c_n, *kept = forward(fold.options, fold.batch_sizes, fold.inputs(tensors, dims))
    results = [
        fold.split(y, fold.axis),
        fold.split(h_n, 1),
        fold.split(c_n, 1) if options.mode == "LSTM" else (c_n, None),
    ]
    if kept:
        reserve, y = kept
        results += [(reserve, None), fold.split(y, fold.axis)]
    return tuple(result for result, _ in results), tuple(dim for _, dim in results)


def _run_for_backward(
    options: Options, batch_sizes: MaybeTensor, tensors: Sequence[MaybeTensor]
) -> tuple[Tensor, ...]:
    return _Forward.apply(options, batch_sizes, *tensors)


class _Forward(Function):
    """Outputs y, h_n, c_n, and what backward reads: the reserve, and y as it was."""

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
        with _without_autocast(y):
            gradients = _Backward.apply(
                ctx.options, needs, None, ctx.batch_sizes, y, reserve, dy, dh_n, dc_n, *tensors
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
        return _run_samples(
            _run_for_backward, options, batch_sizes, tensors, in_dims[2:], info.batch_size
        )


class _Backward(Function):
    """Gradients of those of x, h0, c0 and the weights that are needed, in this order.

    With `count`, the batch holds so many samples, as a `Fold` leaves them, and gradients of weights
    are each sample's own. `reserve` is then the batch's, or one that samples share.
    """

    @staticmethod
    def forward(
        options: Options,
        needs: Needs,
        count: int | None,
        batch_sizes: MaybeTensor,
        y: Tensor,
        reserve: Tensor,
        dy: MaybeTensor,
        dh_n: MaybeTensor,
        dc_n: MaybeTensor,
        *tensors: MaybeTensor,
    ) -> tuple[Tensor, ...]:
        def op(mode: str, *arguments: Any) -> list[Tensor]:
            first, rest = arguments[:5], arguments[5:]
            return ops.recurrent_backward.default(
                mode, dy, dh_n, dc_n, *first, y, reserve, *rest, 0.0, list(needs.of), count
            )

        return tuple(options.call(op, batch_sizes, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.needs, ctx.count, ctx.batch_sizes, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        needs = Needs(tuple(ctx.needs_input_grad[6:]))
        chosen, function = needs.restrict(_reference_gradients(ctx), ctx.saved_tensors)
        with _without_autocast(cotangents[0]):
            pull = torch.func.vjp(function, *chosen)[1]
            return (*(None,) * 6, *needs.spread(pull(cotangents)))

    @staticmethod
    def jvp(ctx: Any, *tangents: MaybeTensor) -> Any:
        return _push_forward(_reference_gradients(ctx), ctx.saved_tensors, tangents[6:])

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        options: Options,
        needs: Needs,
        count: int | None,
        batch_sizes: MaybeTensor,
        y: Tensor,
        reserve: Tensor,
        *tensors: MaybeTensor,
    ) -> Any:
        dims = in_dims[6:]
        if info.batch_size == 0:  # the Jacobian of nothing
            empty = tuple(
                t.new_empty(0, *t.shape) if dim is None else t.movedim(dim, 0)
                for t, dim, need in zip(tensors[3:], dims[3:], needs.of, strict=True)
                if need and t is not None
            )
            return empty, (0,) * len(empty)
        if any(dim is not None for dim in dims[6:]):  # a weight is another for each sample
            runs = [
                _Backward.apply(options, needs, count, batch_sizes, *sample)
                for sample in samples((y, reserve, *tensors), in_dims[4:], info.batch_size)
            ]
            stacked = tuple(map(torch.stack, zip(*runs, strict=True)))
            return stacked, (0,) * len(stacked)
        fold = Fold(options, batch_sizes, tensors[3], dims[3], info.batch_size)
        y_dim, reserve_dim = in_dims[4:6]
        assert reserve_dim is None
        gradients = _Backward.apply(
            fold.options,
            needs,
            (1 if count is None else count) * info.batch_size,
            fold.batch_sizes,
            fold.join(y, y_dim, fold.axis),
            reserve,
            *fold.inputs(tensors[:3], dims[:3]),
            *fold.inputs(tensors[3:], dims[3:]),
        )
        axes = [axis for axis, need in zip((fold.axis, 1, 1), needs.of, strict=False) if need]
        results = [fold.split(*pair) for pair in zip(gradients, axes, strict=False)]
        for gradient in gradients[len(axes) :]:
            results.append(
                (gradient, 0) if count is None else (gradient.unflatten(0, (count, -1)), 1)
            )
        return tuple(result for result, _ in results), tuple(dim for _, dim in results)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Computes as the forward pass did, whatever surrounds the backward pass."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _reference(ctx: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What the forward pass computes, as a differentiable function of the tensors."""
    return lambda *tensors: ctx.options.call(
        ops.reference.default, as_list(ctx.batch_sizes), tensors
    )


def _reference_gradients(ctx: Any) -> Callable[..., tuple[Tensor, ...]]:
    """What _Backward computes, as a differentiable function of dy, dh_n, dc_n and the tensors."""

    def gradients(
        dy: MaybeTensor, dh_n: MaybeTensor, dc_n: MaybeTensor, *tensors: MaybeTensor
    ) -> tuple[Tensor, ...]:
        def op(mode: str, *arguments: Any) -> list[Tensor]:
            return ops.reference_backward.default(mode, dy, dh_n, dc_n, *arguments)

        rest = list(ctx.needs.of), ctx.count
        return tuple(ctx.options.call(op, as_list(ctx.batch_sizes), tensors, *rest))

    return gradients


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
