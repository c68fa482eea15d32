"""Gradients of gradients, which torch.nn gives for every module and dtype."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, grad
from torch.autograd.functional import hessian, jacobian

import fastrnn
from helpers import (
    DTYPES,
    KINDS,
    Case,
    Inputs,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    loss,
    make_inputs,
)

SMALL = {"T": [3], "N": [2], "I": [2], "H": [3], "dtype": [torch.float64], "hx": [True]}


@pytest.mark.parametrize(
    "case",
    [
        *cases(**SMALL),
        *cases(**SMALL, L=[2], D=[2], P=[0, 2]),
        *cases(**SMALL, lengths=[(1, 3)], P=[0, 2]),
    ],
    ids=str,
)
def test_gradgradcheck(case: Case) -> None:
    module = build(fastrnn, case)
    inputs = make_inputs(case)
    tensors = [t.requires_grad_() for t in inputs if isinstance(t, Tensor)]

    def outputs(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(module, inputs).values())

    wanted = (*tensors, module.weight_hh_l0)
    assert torch.autograd.gradgradcheck(outputs, wanted, fast_mode=True)


def penalty_gradients(module: nn.RNNBase, inputs: Inputs) -> dict[str, Tensor]:
    """Returns the gradients of a gradient penalty: of the square of the loss's gradient."""
    leaves = Inputs(*(v.clone().requires_grad_() if isinstance(v, Tensor) else v for v in inputs))
    tensors = {n: t for n, t in leaves._asdict().items() if isinstance(t, Tensor)}
    tensors |= dict(module.named_parameters())
    torch.manual_seed(4)
    total = loss(call(module, leaves), ("y", "h_n", "c_n"))
    first = torch.autograd.grad(total, list(tensors.values()), create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in first]).sum()
    (total + penalty).backward()
    results = {f"first_{name}": g.detach() for name, g in zip(tensors, first, strict=True)}
    return results | {name: t.grad for name, t in tensors.items() if t.grad is not None}


@pytest.mark.parametrize(
    "case",
    [
        *cases(L=[1, 2], D=[1, 2], hx=[True], dtype=DTYPES),
        *cases(L=[2], D=[2], P=[0, 3], lengths=[(2, 7, 4)], hx=[True], dtype=DTYPES),
        *cases(L=[2], bias=[False], batch_first=[True]),
        *cases(N=[None], L=[2]),
        *cases(L=[2], dropout=[0.5]),
    ],
    ids=str,
)
def test_gradient_penalty(case: Case) -> None:
    inputs = make_inputs(case)
    ours = penalty_gradients(build(fastrnn, case), inputs)
    assert_same(ours, penalty_gradients(build(nn, case), inputs), factor=10)


class Call(NamedTuple):
    """A module, or a cell, its input, and how many times a graph was told of its gradient."""

    module: nn.Module
    x: Tensor
    hooks: list[str]

    @property
    def weights(self) -> list[str]:
        """The names of w_ih and w_hh."""
        names = [name for name, _ in self.module.named_parameters() if name.startswith("weight")]
        assert len(names) == 2
        return names

    def run(self, state: Any = None) -> tuple[Tensor, Any]:
        """Returns the output, and the state to go on from."""
        outputs = self.module(self.x, state)
        if isinstance(self.module, nn.RNNBase):
            return outputs
        return (outputs[0] if isinstance(outputs, tuple) else outputs), outputs

    def state(self, h: Tensor) -> Any:
        """Returns h, or h as h and as c."""
        is_lstm = isinstance(self.module, nn.LSTMCell) or getattr(self.module, "mode", "") == "LSTM"
        return (h, h) if is_lstm else h


def chained(call: Call) -> Tensor:
    state = None
    for _ in range(3):
        y, state = call.run(state)
    return y


def state_of_input(call: Call) -> Tensor:
    h = call.x[:1] if isinstance(call.module, nn.RNNBase) else call.x
    return call.run(call.state(h * 2))[0]


def one_weight_twice(call: Call) -> Tensor:
    w_ih, w_hh = call.weights
    setattr(call.module, w_hh, getattr(call.module, w_ih))
    return call.run()[0]


def weight_of_a_weight(call: Call) -> Tensor:
    w_ih, w_hh = call.weights
    original = getattr(call.module, w_ih)
    names = {w_hh: original * 3 + 1}
    y = torch.func.functional_call(call.module, names, (call.x,))
    return y[0] if isinstance(y, tuple) else y


def hooked(call: Call) -> Tensor:
    for tensor in (call.x, getattr(call.module, call.weights[0])):
        tensor.register_hook(lambda gradient: (call.hooks.append("called"), gradient * 2)[1])
    return call.run()[0]


GRAPHS = [chained, state_of_input, one_weight_twice, weight_of_a_weight, hooked]


def gradients_of_graph(
    package: ModuleType, name: str, graph: Callable[[Call], Tensor], how: str
) -> dict[str, Tensor]:
    """Returns gradients of what `graph` makes of a call, and how often its hooks were called."""
    torch.manual_seed(1)
    module = getattr(package, name)(4, 4).double()
    size = (2, 4) if name.endswith("Cell") else (5, 2, 4)
    call = Call(module, torch.randn(size, dtype=torch.double).requires_grad_() * 1, [])
    y = graph(call)
    wanted = [call.x, *dict.fromkeys(module.parameters())]
    if how == "batched":
        vectors = torch.randn(3, *y.shape, dtype=torch.double)
        results = torch.autograd.grad(y, wanted, vectors, is_grads_batched=True, allow_unused=True)
    else:
        results = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True, allow_unused=True)
    if how == "twice":
        total = sum(result.square().sum() for result in results if result is not None)
        results = torch.autograd.grad(total, wanted, allow_unused=True)
    named = {f"{i}": result.detach() for i, result in enumerate(results) if result is not None}
    return named | {"hooks": torch.tensor(float(len(call.hooks)))}


@pytest.mark.parametrize("how", ["once", "twice", "batched"])
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_inputs_that_depend_on_each_other(
    name: str, graph: Callable[[Call], Tensor], how: str
) -> None:
    ours = gradients_of_graph(fastrnn, name, graph, how)
    assert_same(ours, gradients_of_graph(nn, name, graph, how), factor=10)
    assert ours["hooks"] == (0 if graph is not hooked else 4 if how == "twice" else 2)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_vmap_over_gradients_of_a_graph(name: str) -> None:
    results = []
    for package in (fastrnn, nn):
        torch.manual_seed(1)
        module = getattr(package, name)(4, 4).double()
        x = torch.randn(2, 4, dtype=torch.double).requires_grad_()
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        vectors = torch.randn(3, *y.shape, dtype=torch.double)
        wanted = [x, *module.parameters()]
        found = torch.vmap(lambda v, y=y, w=wanted: grad(y, w, v, retain_graph=True))(vectors)
        results.append({str(i): gradient for i, gradient in enumerate(found)})
    assert_same(*results, factor=10)


def test_hooks_of_parameters_when_the_graph_is_kept() -> None:
    seen = []
    for package in (nn, fastrnn):
        torch.manual_seed(1)
        module = package.RNN(4, 4).double()
        module.weight_ih_l0.register_hook(lambda gradient: gradient * 2)
        x = torch.randn(5, 2, 4, dtype=torch.double).requires_grad_() * 1
        x.retain_grad()
        module(x)[0].sum().backward(create_graph=True)
        seen.append({"x": x.grad.detach(), "w_ih": module.weight_ih_l0.grad.detach()})
    assert_same(seen[1], seen[0], factor=10)


def derivatives(module: nn.RNNBase, x: Tensor, vectorize: bool) -> dict[str, Tensor]:
    """Returns a Jacobian and a Hessian of functions of the output."""
    return {
        "jacobian": jacobian(lambda x: module(x)[0].sum(dim=(0, 1)), x, vectorize=vectorize),
        "hessian": hessian(lambda x: module(x)[0].square().sum(), x, vectorize=vectorize),
    }


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize("case", cases(T=[3], N=[2], I=[2], H=[4], L=[2], dtype=DTYPES), ids=str)
def test_jacobian_and_hessian(case: Case, vectorize: bool) -> None:
    x = make_inputs(case).x
    ours = derivatives(build(fastrnn, case), x, vectorize)
    assert_same(ours, derivatives(build(nn, case), x, vectorize), factor=10)


@pytest.mark.parametrize("kind", KINDS)
def test_third_derivative(kind: str) -> None:
    case = Case(kind, T=3, N=2, I=2, H=4, dtype=torch.float64)
    results = []
    for package in (fastrnn, nn):
        module, x = build(package, case), make_inputs(case).x.requires_grad_()
        value = module(x)[0].pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        results.append({"gradient": gradient.detach()})
    assert_same(*results, factor=100)


@pytest.mark.parametrize("case", cases(T=[5], L=[2], P=[0, 3], lengths=[None, (2, 5, 4)]), ids=str)
def test_training_with_a_gradient_penalty(case: Case) -> None:
    losses = []
    for package in (fastrnn, nn):
        module, inputs = build(package, case), make_inputs(case)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(5):
            x = inputs.x.clone().requires_grad_()
            y = call(module, inputs._replace(x=x))["y"]
            (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
            value = (y - 0.5).square().mean() + penalty
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
    ours, theirs = torch.stack(losses).chunk(2)
    assert ours[-1] < ours[0]
    # Adam divides by the gradients' size, which magnifies the rounding of small ones.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("case", cases(T=[5], L=[2], D=[2], lengths=[None, (2, 5, 4)]), ids=str)
def test_first_gradients_are_one_fused_call(case: Case, create_graph: bool) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    total = call(module, inputs)["y"].sum()
    with torch.profiler.profile() as profile:
        found = torch.autograd.grad(total, list(module.parameters()), create_graph=create_graph)
    assert all(gradient.requires_grad == create_graph for gradient in found)
    names = [event.name for event in profile.events()]
    # The op below autograd is called by its part above.
    backward = [e for e in profile.events() if e.name == "fastrnn::recurrent_backward"]
    assert len([e for e in backward if e.cpu_parent not in backward]) == 1
    assert not {"aten::linear", "aten::mm", "aten::addmm"} & set(names)


@pytest.mark.parametrize(
    "case", cases(L=[2], D=[2], P=[0, 3], lengths=[None, (2, 7, 4)], hx=[True]), ids=str
)
def test_second_gradients_are_of_the_fused_run(case: Case) -> None:
    """Without a graph of their own; with one they are of a run that has derivatives."""
    module, inputs = build(fastrnn, case), make_inputs(case)
    x = inputs.x.requires_grad_()
    wanted = [x, *module.parameters()]
    results = []
    for create_graph in (False, True):
        y = call(module, inputs._replace(x=x))["y"]
        (dx,) = grad(y.sin().sum(), x, create_graph=True)
        with torch.profiler.profile() as profile:
            found = grad(dx.square().sum(), wanted, create_graph=create_graph)
        assert all(gradient.requires_grad == create_graph for gradient in found)
        results.append({str(i): gradient.detach() for i, gradient in enumerate(found)})
        names = {event.name for event in profile.events()}
        assert ("aten::linear" in names) == create_graph
    assert_same(*results, factor=10)


@pytest.mark.parametrize("kind", KINDS)
def test_second_gradients_after_a_write_to_the_output(kind: str) -> None:
    case = Case(kind)
    results = []
    for writes in (False, True):
        module, x = build(fastrnn, case), make_inputs(case).x.requires_grad_()
        y = module(x)[0]
        (dx,) = grad(y.sum(), x, create_graph=True)
        if writes:
            with torch.no_grad():
                y.zero_()
        found = grad(dx.square().sum(), [x, *module.parameters()], allow_unused=True)
        results.append({str(i): g for i, g in enumerate(found) if g is not None})
    assert_equal(*results)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], hx=[True]), ids=str)
def test_a_graph_of_the_gradients_leaves_their_bits(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    total = loss(call(module, inputs), ("y", "h_n", "c_n"))
    wanted = list(module.parameters())
    plain = torch.autograd.grad(total, wanted, retain_graph=True)
    recorded = torch.autograd.grad(total, wanted, create_graph=True)
    assert all(gradient.requires_grad for gradient in recorded)
    assert_equal(
        {str(i): gradient.detach() for i, gradient in enumerate(recorded)},
        {str(i): gradient for i, gradient in enumerate(plain)},
    )


@pytest.mark.parametrize("case", cases(L=[2], hx=[True]), ids=str)
def test_autocast_around_the_backward_pass(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    x = inputs.x.requires_grad_()
    y = call(module, inputs)["y"]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            (dx,) = grad(y.sum(), x, create_graph=True)
            twice = grad(dx.square().sum(), list(module.parameters()), allow_unused=True)
        found = {"dx": dx.detach()} | {str(i): g for i, g in enumerate(twice) if g is not None}
        results.append(found)
    assert_equal(*results)


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_one_bias_wanted(case: Case, name: str) -> None:
    results = []
    for package in (fastrnn, nn):
        module = build(package, case).requires_grad_(False)
        bias = getattr(module, name).requires_grad_()
        y = call(module, make_inputs(case))["y"]
        (once,) = grad(y.sin().sum(), bias, create_graph=True)
        (twice,) = grad(once.square().sum(), bias)
        results.append({"once": once.detach(), "twice": twice})
    assert_same(*results, factor=10)


class Without(torch.autograd.Function):
    """Gives no gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(*_: Any) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> None:
        return None

    @staticmethod
    def jvp(_: Any, tangent: Tensor) -> Tensor:
        return tangent


@pytest.mark.parametrize("how", ["once", "twice", "of_dual_numbers"])
@pytest.mark.parametrize("package", [fastrnn, nn], ids=["fastrnn", "nn"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_no_gradient_gives_none(name: str, package: ModuleType, how: str) -> None:
    module = getattr(package, name)(4, 4, dtype=torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x)) if how == "of_dual_numbers" else x
        y = module(dual)
        y = y[0] if isinstance(y, tuple) else y
        results = (y,) if how != "twice" else grad(y.sin().sum(), wanted, create_graph=True)
        total = torch.stack([Without.apply(result).sum() for result in results]).sum()
        assert grad(total, wanted, allow_unused=True) == (None,) * len(wanted)


@pytest.mark.parametrize("how", ["once", "twice", "of_dual_numbers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_used_once(kind: str, how: str) -> None:
    module, x = build(fastrnn, Case(kind)), make_inputs(Case(kind)).x.requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x)) if how == "of_dual_numbers" else x
        total = forward_ad.unpack_dual(module(dual)[0]).primal.sum()
        if how == "twice":
            total = grad(total, x, create_graph=True)[0].sum()
        grad(total, x)
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            grad(total, x)
