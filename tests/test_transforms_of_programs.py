"""Transforms of programs that were exported or traced, whose calls are the ops'."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import fastrnn
from helpers import Recorder
from programs import (
    ALL,
    MODULES,
    TRANSFORMS,
    WAYS_TO_DERIVE,
    build_both,
    draw,
    each,
    exported,
    first,
    flat,
    losses,
    traced,
)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make", [exported, traced], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("kind", "options"), ALL)
def test_program(kind: str, options: str, make: Callable[..., Any], transform: str) -> None:
    ours, _ = build_both(kind, options)
    x = draw(kind)
    expected = flat(TRANSFORMS[transform](ours, x))
    found = flat(TRANSFORMS[transform](make(ours, x), x))
    assert_close(found, expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_program_under_autocast(transform: str) -> None:
    ours, _ = build_both("LSTM", "stack")
    x = draw("LSTM").float()
    program = exported(ours.float(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert first(program(x)).dtype == torch.bfloat16
        found, expected = (TRANSFORMS[transform](call, x) for call in (program, ours))
    for got, want in zip(flat(found), flat(expected), strict=True):
        assert_close(got, want, rtol=0, atol=0)


def test_weights_of_a_program_under_autocast() -> None:
    ours, _ = build_both("LSTM")
    x = draw("LSTM").float()
    program = exported(ours.float(), x)

    def outputs(module: Any) -> Tensor:
        weights = {name: torch.stack([p, p.sin()]) for name, p in module.named_parameters()}
        return vmap(lambda w: functional_call(module, w, (x,))[0])(weights)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert outputs(program).dtype == torch.bfloat16
        assert_close(outputs(program), outputs(ours), rtol=0, atol=0)


def test_program_of_any_size() -> None:
    ours, _ = build_both("LSTM", "stack")
    sizes = {0: torch.export.Dim("T"), 1: torch.export.Dim("N")}
    program = torch.export.export(ours, (draw("LSTM"),), dynamic_shapes=(sizes,)).module()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    assert_close(grad(losses(program))(x), grad(losses(ours))(x))
    many = torch.stack([x, x.sin()])
    assert_close(vmap(each(program))(many), vmap(each(ours))(many))


def test_weights_of_a_program() -> None:
    ours, _ = build_both("LSTM", "stack")
    x = draw("LSTM")
    program = exported(ours, x)

    def gradients(module: Any) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in module.named_parameters()}
        return grad(lambda w: losses(lambda x: functional_call(module, w, (x,)))(x))(weights)

    assert_close(gradients(program), gradients(ours))


@pytest.mark.parametrize("make", [exported, traced], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("kind", "options"), ALL)
def test_vmap_of_a_program_is_one_fused_call(
    kind: str, options: str, make: Callable[..., Any]
) -> None:
    ours, _ = build_both(kind, options)
    x = draw(kind)
    program = make(ours, x)
    op = "cell" if "Cell" in kind else "recurrent"
    with torch.no_grad(), Recorder(f"fastrnn::{op}") as recorder:
        vmap(each(program))(torch.stack([x, x.sin(), x.cos()]))
    assert len(recorder.calls) == 1


@pytest.mark.parametrize("make", [exported, traced], ids=lambda make: make.__name__)
@pytest.mark.parametrize("transform", ["grad", "per_sample"])
@pytest.mark.parametrize(("kind", "options"), ALL)
def test_gradients_of_a_program_are_fused(
    kind: str, options: str, transform: str, make: Callable[..., Any]
) -> None:
    ours, _ = build_both(kind, options)
    x = draw(kind)
    program = make(ours, x)
    with (
        Recorder("fastrnn::recurrent_forward") as forward,
        Recorder("fastrnn::recurrent_backward") as backward,
    ):
        TRANSFORMS[transform](program, x)
    assert len(forward.calls) == len(backward.calls) == 1


# Of x, h0, c0 with two samples each, and of two numbers.
NESTED: dict[str, Callable[..., Any]] = {
    "vmap_of_vmap": lambda f, xs, hx, scales: vmap(
        lambda x, hx: vmap(lambda s: first(f(s * x, hx)))(scales)
    )(xs, hx),
    "each_by_a_level": lambda f, xs, hx, scales: vmap(
        lambda hx: vmap(lambda x: first(f(x, hx)))(xs)
    )(hx),
    "gradient_between": lambda f, xs, hx, scales: vmap(
        lambda x, hx: grad(lambda x: vmap(lambda s: first(f(s * x, hx)).sum())(scales).sum())(x)
    )(xs, hx),
    "gradient_between_and_no_samples": lambda f, xs, hx, scales: vmap(
        lambda x, hx: grad(lambda x: vmap(lambda s: s * first(f(x, hx)).sum())(scales).sum())(x)
    )(xs, hx),
    "gradient_around": lambda f, xs, hx, scales: grad(
        lambda xs: vmap(lambda x, hx: first(f(x, hx)))(xs, hx).square().sum()
    )(xs),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("make", ["module", "exported"])
def test_nested_levels(name: str, make: str) -> None:
    ours, theirs = build_both("LSTM")
    x, scales = draw("LSTM"), torch.tensor([1.0, -2.0], dtype=torch.float64)
    h, c = torch.randn(2, 2, 1, 2, 5, dtype=torch.float64)
    example = (x, (h[0], c[0]))
    call = torch.export.export(ours, example).module() if make == "exported" else ours
    found = NESTED[name](call, torch.stack([x, x.sin()]), (h, c), scales)

    def by_steps(x: Tensor, hx: tuple[Tensor, Tensor]) -> Tensor:
        h, c = (state[0] for state in hx)
        outputs = []
        for step in x:
            i, f, g, o = (
                nn.functional.linear(step, theirs.weight_ih_l0, theirs.bias_ih_l0)
                + nn.functional.linear(h, theirs.weight_hh_l0, theirs.bias_hh_l0)
            ).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs)

    assert_close(found, NESTED[name](by_steps, torch.stack([x, x.sin()]), (h, c), scales))


@pytest.mark.parametrize("make", ["exported", "compiled"])
def test_randomness_of_dropout(make: str) -> None:
    ours = fastrnn.LSTM(4, 50, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = draw("LSTM")
    program = exported(ours, x) if make == "exported" else ours
    run = {r: vmap(lambda x: first(program(x)), randomness=r) for r in ("same", "different")}
    if make == "compiled":
        torch._dynamo.reset()
        run = {r: torch.compile(f, backend="aot_eager", fullgraph=True) for r, f in run.items()}
    one, other = run["same"](torch.stack([x, x]))
    assert_close(one, other)
    one, other = run["different"](torch.stack([x, x]))
    assert not torch.allclose(one, other)


TRACED = [
    *product(["LSTM", "RNN", "LSTMCell"], ["grad", "jvp", "vmap"]),
    ("LSTMCell", "hessian"),
]


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize(("kind", "transform"), TRACED)
def test_make_fx_of_a_transform(kind: str, transform: str, mode: str) -> None:
    ours, _ = build_both(kind)
    x = draw(kind)

    def function(x: Tensor) -> Any:
        return TRANSFORMS[transform](ours, x)

    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert_close(flat(graph(x)), flat(function(x)))


@pytest.mark.parametrize("way", WAYS_TO_DERIVE)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", MODULES)
def test_transform_of_a_traced_gradient(kind: str, trained: bool, way: str) -> None:
    """Where the trace hands recurrent_backward an output that is transformed as well."""
    ours = build_both(kind)[0].requires_grad_(trained)
    x = draw(kind)
    gradient = grad(losses(ours))
    graph = make_fx(gradient, _allow_non_fake_inputs=True)(x)
    found, expected = (WAYS_TO_DERIVE[way](each(f), x) for f in (graph, gradient))
    assert_close(flat(found), flat(expected))
