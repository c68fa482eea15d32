"""Transforms in compiled code, and of what was compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, autograd
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

from programs import (
    ALL,
    MODULES,
    TRANSFORMS,
    build_both,
    draw,
    each,
    first,
    flat,
    losses,
)

COMPILED = [
    (kind, options, transform, dynamic)
    for kind, options in [("LSTM", "plain"), ("RNN", "stack"), ("LSTMCell", "plain")]
    for transform in ("grad", "jvp", "vmap", "per_sample")
    for dynamic in ([None, True] if transform in ("grad", "vmap") else [None])
]
# Of one step: torch compiles several for long.
COMPILED += [("LSTMCell", "plain", "hessian", dynamic) for dynamic in (None, True)]


@pytest.mark.parametrize(("kind", "options", "transform", "dynamic"), COMPILED)
def test_transform_in_compiled_code(
    kind: str, options: str, transform: str, dynamic: bool | None
) -> None:
    ours, _ = build_both(kind, options)
    x = draw(kind)[:2].clone()  # torch itself cannot compile jvp of a view of a view
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: TRANSFORMS[transform](ours, x),
        backend="aot_eager",
        fullgraph=True,
        dynamic=dynamic,
    )
    assert_close(flat(function(x)), flat(TRANSFORMS[transform](ours, x)))


def compile_for_any_size(
    function: Callable[..., Any],
) -> tuple[Callable[..., Any], list[list[str]]]:
    """Returns `function` compiled, and a list to which each graph adds its calls of ops."""
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        names = (str(node.target) for node in graph.graph.nodes)
        graphs.append([name for name in names if "fastrnn" in name])
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=True), graphs


@pytest.mark.parametrize("kind", MODULES)
def test_compiled_vmap_is_one_fused_call_of_any_size(kind: str) -> None:
    ours, _ = build_both(kind)
    function, graphs = compile_for_any_size(lambda x: vmap(each(ours))(x))
    with torch.no_grad():
        for repeats in (3, 5):
            x = torch.stack([draw(kind).repeat_interleave(repeats, 0)] * repeats)
            assert_close(function(x), vmap(each(ours))(x))
    (graph,) = graphs
    assert graph == ["fastrnn.cell.default" if "Cell" in kind else "fastrnn.recurrent.default"]


@pytest.mark.parametrize("kind", MODULES)
def test_compiled_vmap_of_a_module_itself(kind: str) -> None:
    ours, _ = build_both(kind)
    x = draw(kind)
    torch._dynamo.reset()
    function = torch.compile(vmap(ours), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(function(x), vmap(ours)(x))
    # By this name, and not by its repr, which cannot be compiled.
    with pytest.raises(ValueError, match=rf"^vmap\({kind}, in_dims=a"):
        vmap(ours, in_dims="a")(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_compiled_gradients_are_fused_and_of_any_size(kind: str, per_sample: bool) -> None:
    ours, _ = build_both(kind)
    weights = {name: p.detach() for name, p in ours.named_parameters()}

    def gradients(weights: dict[str, Tensor], x: Tensor) -> Any:
        return grad(lambda w: losses(lambda x: functional_call(ours, w, (x,)))(x))(weights)

    def derive(weights: dict[str, Tensor], x: Tensor) -> Any:
        return vmap(gradients, (None, 0))(weights, x) if per_sample else gradients(weights, x)

    function, graphs = compile_for_any_size(derive)
    for length in (7, 9):
        x = torch.randn(*[length + 1] * per_sample, length, 3, 4, dtype=torch.float64)
        assert_close(function(weights, x), derive(weights, x))
    (graph,) = graphs
    assert graph == [
        "fastrnn.recurrent_forward.default",
        "fastrnn.recurrent_backward.default",
    ]


def test_packed_is_left_out_of_compiled_code() -> None:
    ours, _ = build_both("LSTM", "stack")
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    function = vmap(lambda x: ours(PackedSequence(x, torch.tensor([3, 2, 1])))[0].data)
    torch._dynamo.reset()
    assert_close(torch.compile(function, backend="eager")(x), function(x))


@pytest.mark.parametrize("kind", MODULES)
def test_forward_mode_in_compiled_code(kind: str) -> None:
    ours, _ = build_both(kind)

    def tangent(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.cos())
            return forward_ad.unpack_dual(first(ours(dual))).tangent

    x = draw(kind)
    torch._dynamo.reset()
    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), tangent(x))


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_batch_of_gradients_of_compiled_code(kind: str, options: str) -> None:
    ours, _ = build_both(kind, options)
    x = draw(kind).requires_grad_()
    torch._dynamo.reset()
    results = []
    for module in (torch.compile(ours, backend="aot_eager"), ours):
        y = first(module(x))
        batch = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
        inputs = [x, *ours.parameters()]
        results.append(autograd.grad(y, inputs, batch, is_grads_batched=True))
    assert_close(*results)
