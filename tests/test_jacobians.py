"""Jacobians, Hessians and their derivatives, held against torch.nn's in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from helpers import KINDS, Case, assert_same, build, cases, make_inputs

COMPOSITIONS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev_jacrev": lambda f: jacrev(jacrev(f)),
    "jacrev_jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacfwd_jacfwd": lambda f: jacfwd(jacfwd(f)),
    "forward_mode": lambda f: partial(
        autograd.functional.jacobian, f, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize(
    "case", cases(T=[3], N=[None, 2], I=[2], H=[4], L=[2], dtype=[torch.float64]), ids=str
)
def test_jacobians_and_hessians(case: Case, name: str) -> None:
    x = make_inputs(case).x
    ours, theirs = build(fastrnn, case), build(nn, case)
    if name in ("jacrev", "jacfwd", "forward_mode"):
        truth, outputs = autograd.functional.jacobian, lambda y: y.sum(dim=0)
    else:
        truth, outputs = autograd.functional.hessian, lambda y: y.square().sum()
    result = COMPOSITIONS[name](lambda x: outputs(ours(x)[0]))(x).detach()
    expected = truth(lambda x: outputs(theirs(x)[0]), x)
    assert_same({name: result}, {name: expected}, factor=100)


@pytest.mark.parametrize("name", ["hessian", "jacrev_jacrev", "jacrev_jacfwd", "jacfwd_jacfwd"])
@pytest.mark.parametrize(
    "case",
    cases(
        T=[3],
        N=[2],
        I=[2],
        H=[4],
        L=[2],
        P=[0, 3],
        lengths=[None, (3, 2)],
        dtype=[torch.float64],
    ),
    ids=str,
)
def test_hessians_of_several_outputs(case: Case, name: str) -> None:
    """Each has a sample of its own in the gradients, which share the run that they are of."""
    x, ours, theirs = make_inputs(case).x, build(fastrnn, case), build(nn, case)
    packed = case.lengths and pack_padded_sequence(x, list(case.lengths))
    if packed:
        x = packed.data

    def outputs(module: nn.RNNBase, x: Tensor) -> Tensor:
        y = module(packed._replace(data=x) if packed else x)[0]
        return (y.data if packed else y).square().flatten(0, -2).sum(dim=0)

    result = COMPOSITIONS[name](lambda x: outputs(ours, x))(x).detach()
    truth = autograd.functional.hessian
    each = [truth(lambda x, i=i: outputs(theirs, x)[i], x) for i in range(len(result))]
    assert_same({name: result}, {name: torch.stack(each)}, factor=100)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_gradients_of_per_sample_gradients(kind: str) -> None:
    """By autograd's own vmap, which is not torch.func's and has fewer rules."""
    case = Case(kind, T=3, N=2, I=2, H=4, L=2, dtype=torch.float64)
    module, x = build(fastrnn, case), make_inputs(case).x
    weight = module.weight_hh_l0.detach().requires_grad_()

    def total(weight: Tensor, x: Tensor) -> Tensor:
        return functional_call(module, {"weight_hh_l0": weight}, (x,))[0].sin().sum()

    gradients = vmap(grad(total), (None, 0))(weight, torch.stack([x, x.cos()]))
    vectors = torch.randn(3, *gradients.shape, dtype=torch.float64)
    derive = partial(autograd.grad, gradients, weight, retain_graph=True)
    (batched,) = derive(vectors, is_grads_batched=True)
    looped = torch.stack([derive(vector)[0] for vector in vectors])
    assert_same({"batched": batched}, {"batched": looped})


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_of_a_sum(kind: str) -> None:
    # The gradient of a sum is one number, expanded: its memory overlaps.
    case = Case(kind, T=3, N=1, I=2, H=4, dtype=torch.float64)
    x, ours, theirs = make_inputs(case).x, build(fastrnn, case), build(nn, case)
    result = hessian(lambda x: ours(x)[0].sum())(x).detach()
    expected = autograd.functional.hessian(lambda x: theirs(x)[0].sum(), x)
    assert_same({"hessian": result}, {"hessian": expected}, factor=100)


def by_jvp_of_jacrev(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Forward over reverse, for all directions of the output at once."""
    return jvp(jacrev(f), (x,), (torch.ones_like(x),))[1]


def by_grad_of_jacrev(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Reverse over reverse."""
    return grad(lambda x: jacrev(f)(x).sin().sum())(x)


def by_backward_of_jacrev(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Autograd's own, of a graph that torch.func recorded."""
    leaf = x.clone().requires_grad_()
    return autograd.grad(jacrev(f)(leaf).sin().sum(), leaf)[0]


@pytest.mark.parametrize("transform", [by_jvp_of_jacrev, by_grad_of_jacrev, by_backward_of_jacrev])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    "case", cases(T=[4], N=[None, 2], H=[5], L=[2], P=[0, 3], dtype=[torch.float64]), ids=str
)
def test_derivatives_of_jacobians(
    case: Case, frozen: bool, transform: Callable[..., Tensor]
) -> None:
    """The directions of jacrev share what one forward pass kept."""
    x = make_inputs(case).x
    ours, theirs = (build(package, case).requires_grad_(not frozen) for package in (fastrnn, nn))
    result = transform(lambda x: ours(x)[0], x).detach()
    expected = transform(lambda x: theirs(x)[0], x).detach()
    assert_same({"result": result}, {"result": expected}, factor=100)
