"""Transforms that meet the ops themselves, not the modules.

A gradient that a transform follows through a backward pass recorded before it; programs that were
exported, traced or compiled, whose calls are the ops'; and transforms that are compiled.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from helpers import Recorder

MODULES = ["LSTM", "RNN", "LSTMCell", "RNNCell"]
OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "proj": {"proj_size": 3, "batch_first": True},
}
STACKS = [("LSTM", "plain"), ("LSTM", "stack"), ("LSTM", "proj"), ("RNN", "plain")]
ALL = [*STACKS, ("RNN", "stack"), ("LSTMCell", "plain"), ("RNNCell", "plain")]


def build_both(kind: str, options: str = "plain") -> tuple[nn.Module, nn.Module]:
    """Returns fastrnn's module and torch.nn's, of the same weights, in float64."""
    ours, theirs = (
        getattr(package, kind)(4, 5, dtype=torch.float64, **OPTIONS[options])
        for package in (fastrnn, nn)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def draw(kind: str) -> Tensor:
    return (
        torch.randn(2, 4, dtype=torch.float64)
        if "Cell" in kind
        else torch.randn(3, 2, 4, dtype=torch.float64)
    )


def flat(outputs: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(outputs)


def first(outputs: Any) -> Tensor:
    return flat(outputs)[0]


def by_old_api(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    with forward_ad.dual_level():
        found = autograd.grad(y, inputs, forward_ad.make_dual(v, t), retain_graph=True)
        return [tuple(forward_ad.unpack_dual(g)) for g in found]


def by_jvp(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    return jvp(lambda v: autograd.grad(y, inputs, v, retain_graph=True), (v,), (t,))


def by_jacfwd(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    scale = torch.tensor(1.0, dtype=torch.float64)
    return jacfwd(lambda s: autograd.grad(y, inputs, s * v, retain_graph=True))(scale)


def by_grad_of_a_graph(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    def size(s: Tensor) -> Tensor:
        found = autograd.grad(y, inputs, s * v, retain_graph=True, create_graph=True)
        return sum(g.square().sum() for g in found)

    return grad(size)(torch.tensor(2.0, dtype=torch.float64))


def by_vmap_of_jvp(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    return vmap(lambda t: by_jvp(y, inputs, v, t)[1])(torch.stack([t, v, t.sin()]))


def by_jvp_of_vmap(y: Tensor, inputs: list[Tensor], v: Tensor, t: Tensor) -> Any:
    scales = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def gradients(v: Tensor) -> Any:
        return vmap(lambda s: autograd.grad(y, inputs, s * v, retain_graph=True))(scales)

    return jvp(gradients, (v,), (t,))


WAYS = [by_old_api, by_jvp, by_jacfwd, by_grad_of_a_graph, by_vmap_of_jvp, by_jvp_of_vmap]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", MODULES)
def test_gradient_that_is_transformed(kind: str, way: Callable[..., Any]) -> None:
    x = draw(kind).requires_grad_()
    v, t = torch.randn(2, *first(build_both(kind)[0](x)).shape, dtype=torch.float64)
    torch.manual_seed(0)
    ours, theirs = build_both(kind)
    found, expected = (flat(way(first(m(x)), [x, *m.parameters()], v, t)) for m in (ours, theirs))
    assert_close(found, expected)
    assert any(tensor.abs().max() > 1e-3 for tensor in found)


def test_packed_gradient_that_is_transformed() -> None:
    ours, _ = build_both("LSTM", "stack")
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    packed = PackedSequence(x, torch.tensor([3, 2, 1]))
    v, t = torch.randn(2, 6, 10, dtype=torch.float64)
    y = ours(packed)[0].data
    (found,) = by_jvp(y, [x], v, t)[1]
    (expected,) = autograd.grad(y, x, t)  # it is linear
    assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
def test_gradient_under_dropout_that_is_transformed(options: dict[str, bool]) -> None:
    ours = fastrnn.LSTM(4, 5, num_layers=3, dropout=0.5, dtype=torch.float64, **options)
    x = draw("LSTM").requires_grad_()
    y = first(ours(x))
    v, t = torch.randn(2, *y.shape, dtype=torch.float64)
    found = by_jvp_of_vmap(y, [x, *ours.parameters()], v, t)[1]
    expected = autograd.grad(y, [x, *ours.parameters()], t)  # it is linear
    assert_close(found, tuple(torch.stack([g, -2 * g, 3 * g]) for g in expected))


def exported(module: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.export.export(module, (x,)).module()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def traced(module: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.jit.trace(module, (x,))


def losses(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: sum(t.sin().sum() for t in flat(call(x)))


def each(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda x: flat(call(x))


TRANSFORMS = {
    "grad": lambda call, x: grad(losses(call))(x),
    "jacrev": lambda call, x: jacrev(each(call))(x),
    "hessian": lambda call, x: hessian(losses(call))(x),
    "grad_of_grad": lambda call, x: grad(lambda x: grad(losses(call))(x).square().sum())(x),
    "jvp": lambda call, x: jvp(each(call), (x,), (x.cos(),)),
    "jvp_of_grad": lambda call, x: jvp(grad(losses(call)), (x,), (x.cos(),)),
    "vmap": lambda call, x: vmap(each(call))(torch.stack([x, x.sin()])),
    "per_sample": lambda call, x: vmap(grad(losses(call)))(torch.stack([x, x.sin()])),
}


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


@pytest.mark.parametrize(("kind", "mode"), [("LSTM", "LSTM"), ("RNN", "RNN_TANH")])
def test_outputs_under_dropout_are_laid_out_as_without_vmap(kind: str, mode: str) -> None:
    """A program may view y as it could where it was made, and is given an empty c_n of an RNN."""
    ours = getattr(fastrnn, kind)(4, 5, num_layers=2, batch_first=True, dtype=torch.float64)
    weights, x = [p.detach() for p in ours.parameters()], draw(kind)

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        options = (2, True, False, True, 0.5)
        y, h_n, c_n = torch.ops.fastrnn.recurrent(mode, x, None, None, None, weights, *options)
        return y.view(-1), h_n, c_n

    many = vmap(outputs, randomness="different")(torch.stack([x, x]))
    assert [t.shape[1:] for t in many] == [t.shape for t in outputs(x)]


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


@pytest.mark.parametrize("kind", MODULES)
def test_jacobian_of_nothing(kind: str) -> None:
    ours, theirs = build_both(kind)
    x = draw(kind)
    found, expected = (jacrev(lambda x, m=m: first(m(x))[:0])(x) for m in (ours, theirs))
    assert found.shape == expected.shape and found.numel() == 0
    name = next(name for name, _ in ours.named_parameters() if "weight_hh" in name)
    by_weight = jacrev(lambda w: first(functional_call(ours, {name: w}, (x,)))[:0])
    assert by_weight(ours.get_parameter(name)).shape[-2:] == ours.get_parameter(name).shape


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("kind", "options"), ALL)
def test_gradients_share_no_memory(kind: str, options: str, batched: bool) -> None:
    ours, _ = build_both(kind, options)
    y = first(ours(draw(kind)))
    v = torch.ones(2, *y.shape, dtype=torch.float64) if batched else torch.ones_like(y)
    graph = {"is_grads_batched": batched, "create_graph": not batched}
    gradients = autograd.grad(y, list(ours.parameters()), v, **graph)
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


class Counter(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


WAYS_TO_DERIVE: dict[str, Callable[..., Any]] = {
    "plain": lambda f, dy: f(dy),
    "grad": lambda f, dy: grad(lambda dy: sum(g.square().sum() for g in f(dy)))(dy),
    "jvp": lambda f, dy: jvp(f, (dy,), (dy.cos(),)),
    "vmap": lambda f, dy: vmap(f)(torch.stack([dy, dy.sin()])),
}


@pytest.mark.parametrize("way", WAYS_TO_DERIVE)
@pytest.mark.parametrize("name", ["recurrent_backward", "reference_backward"])
@pytest.mark.parametrize(("kind", "mode"), [("LSTM", "LSTM"), ("RNN", "RNN_TANH")])
def test_states_that_are_not_given_have_no_gradients(
    kind: str, mode: str, name: str, way: str
) -> None:
    ops = torch.ops.fastrnn
    x, weights = draw(kind), [p.detach() for p in build_both(kind)[0].parameters()]
    inputs, options = (x, None, None, None, weights), (1, True, False, False)
    y, *_, reserve = ops.recurrent_forward(mode, *inputs, *options, 0.0)
    kept = {"y": y, "reserve": reserve, "dropout": 0.0} if name == "recurrent_backward" else {}
    keys = ("num_layers", "has_biases", "bidirectional", "batch_first")
    results = []
    for of_states in (False, True):

        def gradients(dy: Tensor, of_states: bool = of_states) -> Any:
            return getattr(ops, name)(
                mode,
                dy,
                None,
                None,
                *inputs,
                **kept,
                **dict(zip(keys, options, strict=True)),
                needs=[True, of_states, of_states, *[True] * 4],
                samples=None,
            )

        results.append(flat(WAYS_TO_DERIVE[way](gradients, y.cos())))
    assert_close(*results, rtol=0, atol=0)


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


@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
def test_jacobian_of_all_results_of_an_rnn(kind: str) -> None:
    """Among which is a cell state, of no elements."""
    ops = torch.ops.fastrnn
    weights = [p.detach() for p in build_both(kind)[0].parameters()]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if kind == "RNN":
            options = (1, True, False, False, 0.0)
            return ops.recurrent("RNN_TANH", x, None, None, None, weights, *options)
        return ops.cell("RNN_TANH", x, None, None, weights, True)

    x = draw(kind)
    *found, of_nothing = jacrev(run)(x)
    assert_close(found, list(jacfwd(lambda x: run(x)[:-1])(x)))
    assert of_nothing.shape == (0, *x.shape)


def test_packed_gradient_under_dropout() -> None:
    """Of one layer, which drops nothing."""
    weights = [p.detach() for p in build_both("LSTM")[0].parameters()]
    x, sizes = draw("LSTM").flatten(0, 1), torch.tensor([3, 2, 1])

    def total(x: Tensor, dropout: float) -> Tensor:
        options = (1, True, False, False, dropout)
        y, *_ = torch.ops.fastrnn.recurrent("LSTM", x, sizes, None, None, weights, *options)
        return y.square().sum()

    assert_close(grad(total)(x, 0.5), grad(total)(x, 0.0))


def test_only_wanted_gradients_are_computed() -> None:
    ours, _ = build_both("LSTM")
    x, weights = draw("LSTM"), list(ours.requires_grad_(False).parameters())
    dy = torch.ones_like(first(ours(x)))
    counts = []
    for wanted in (range(5), [0], [1], [3]):  # of x and the weights
        needs = [0 in wanted, False, False, *(i + 1 in wanted for i in range(4))]
        with Counter() as counter:
            torch.ops.fastrnn.reference_backward(
                "LSTM",
                dy,
                None,
                None,
                x,
                None,
                None,
                None,
                weights,
                1,
                True,
                False,
                False,
                needs,
                None,
            )
        counts.append(counter.products)
    steps = x.size(0)
    assert counts == [steps + 3, steps + 1, steps + 1, steps]


@pytest.mark.parametrize("kind", ["LSTM", "RNN_TANH"])
def test_second_derivatives_of_gradients_of_one_run_with_dropout(kind: str) -> None:
    """Whose masks vmap's samples share."""
    make = nn.LSTM if kind == "LSTM" else nn.RNN
    module = make(3, 4, num_layers=3, bidirectional=True).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    options = (3, True, True, False, 0.5)
    y, *_ = torch.ops.fastrnn.recurrent_forward(kind, x, None, None, None, wanted[1:], *options)

    def gradients(v: Tensor) -> tuple[Tensor, ...]:
        return autograd.grad(y, wanted, v, create_graph=True)

    vectors = torch.randn(3, *y.shape, dtype=torch.float64)
    batched = vmap(gradients)(vectors)
    looped = [torch.stack(each) for each in zip(*map(gradients, vectors), strict=True)]
    total, expected = (sum(g.sin().sum() for g in found) for found in (batched, looped))
    assert_close(autograd.grad(total, wanted, retain_graph=True), autograd.grad(expected, wanted))
