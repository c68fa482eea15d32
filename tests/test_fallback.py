"""What is not fused is torch.nn's own computation, with its very result."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, functionalize, grad, jacrev, jvp, vjp

import fastrnn
from helpers import (
    DTYPES,
    KINDS,
    Case,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    run,
    takes_fused_path,
)

LENGTHS = (2, 7, 4)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], batch_first=[False, True]), ids=str)
def test_meta_device(case: Case) -> None:
    x = make_inputs(case).x.to("meta")
    ours, theirs = (build(package, case).to("meta") for package in (fastrnn, nn))
    (y, hidden), (y_nn, hidden_nn) = ours(x), theirs(x)
    assert y.device.type == "meta" and y.shape == y_nn.shape
    states, states_nn = (h if case.kind == "LSTM" else (h,) for h in (hidden, hidden_nn))
    assert [state.shape for state in states] == [state.shape for state in states_nn]


@pytest.mark.parametrize("case", cases(hx=[True], lengths=[None, LENGTHS], dtype=DTYPES), ids=str)
def test_autocast(case: Case) -> None:
    inputs = make_inputs(case)
    ours, theirs = build(fastrnn, case), build(nn, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = call(ours, inputs)
        expected = call(theirs, inputs)
        assert not takes_fused_path(lambda: call(ours, inputs))
    assert_equal(results, expected)
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert takes_fused_path(lambda: call(ours, inputs))


def func_grad(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of the parameters by torch.func.grad."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return grad(lambda p: functional_call(module, p, (x,))[0].square().sum())(parameters)


def func_vjp(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns a vector-Jacobian product by torch.func.vjp."""
    y, pull = vjp(lambda x: module(x)[0], x)
    return {"y": y, "dx": pull(torch.ones_like(y))[0]}


def func_jvp(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns a Jacobian-vector product by torch.func.jvp."""
    y, tangent = jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
    return {"y": y, "tangent": tangent}


def func_jacrev(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns a Jacobian by torch.func.jacrev."""
    return {"jacobian": jacrev(lambda x: module(x)[0].sum(dim=(0, 1)))(x)}


def func_functionalize(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns the output by torch.func.functionalize."""
    return {"y": functionalize(lambda x: module(x)[0])(x)}


def dual_numbers(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns the output and its tangent by forward-mode AD."""
    with forward_ad.dual_level():
        y, _ = module(forward_ad.make_dual(x, torch.ones_like(x)))
        return dict(zip(("y", "tangent"), forward_ad.unpack_dual(y), strict=True))


def dual_weights(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns the output and its tangent, where only a weight has one."""
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(
            module.weight_hh_l0.detach(), torch.ones_like(module.weight_hh_l0)
        )
        y, _ = functional_call(module, {"weight_hh_l0": weight}, (x,))
        return dict(zip(("y", "tangent"), forward_ad.unpack_dual(y), strict=True))


FORWARD_MODE = (func_jvp, dual_numbers, dual_weights)


@pytest.mark.parametrize(
    "transform", [func_grad, func_vjp, func_jacrev, func_functionalize, *FORWARD_MODE]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind: str, dtype: torch.dtype, transform: Callable) -> None:
    if kind == "LSTM" and dtype == torch.float32 and transform in FORWARD_MODE:
        pytest.skip("torch.nn.LSTM has no forward-mode AD in float32")
    case = Case(kind, T=4, H=6, L=2, dtype=dtype)
    x = make_inputs(case).x
    results = [transform(build(package, case), x) for package in (fastrnn, nn)]
    assert_same(*[{name: t.detach() for name, t in result.items()} for result in results])


def forward_jacobian(module: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """Returns a Jacobian by forward-mode AD under vmap."""
    result = jacobian(lambda x: module(x)[0], x, vectorize=True, strategy="forward-mode")
    return {"jacobian": result}


@pytest.mark.parametrize("case", cases(KINDS[1:], T=[3], N=[2], I=[2], H=[4]), ids=str)
def test_vectorized_forward_mode_jacobian(case: Case) -> None:
    x = make_inputs(case).x
    ours, theirs = build(fastrnn, case), build(nn, case)
    assert_same(forward_jacobian(ours, x), forward_jacobian(theirs, x))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_again_after_a_transform(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    func_grad(module, inputs.x)
    assert_equal(run(module, inputs), expected)
    assert takes_fused_path(lambda: call(module, inputs))
