"""Gradients of gradients, which torch.nn gives for every module and dtype."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

import fastrnn
from helpers import DTYPES, KINDS, Case, Inputs, assert_same, build, call, cases, loss, make_inputs

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
def test_only_create_graph_leaves_the_kernels(case: Case, create_graph: bool) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    total = call(module, inputs)["y"].sum()
    with torch.profiler.profile() as profile:
        torch.autograd.grad(total, list(module.parameters()), create_graph=create_graph)
    names = [event.name for event in profile.events()]
    products = sum(name in ("aten::linear", "aten::mm", "aten::addmm") for name in names)
    assert names.count("fastrnn::recurrent_backward") == (not create_graph)
    assert (products > 0) == create_graph
