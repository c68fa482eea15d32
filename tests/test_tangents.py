"""Forward-mode AD: tangents of the modules, the ops and of gradients, and gradients of tangents."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp

import fastrnn
from derivatives import (
    Results,
    arguments_of,
    as_function,
    by_dual_numbers,
    by_jvp,
    by_jvp_of_grad,
    with_tangent,
)
from helpers import (
    KINDS,
    Case,
    Inputs,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    draw_masks,
    make_inputs,
)

SMALL = {"T": [3], "N": [2], "I": [2], "H": [3], "dtype": [torch.float64], "hx": [True]}


@pytest.mark.parametrize(
    "case",
    [*cases(**SMALL), *cases(**SMALL, L=[2], D=[2], P=[2]), *cases(**SMALL, lengths=[(1, 3)])],
    ids=str,
)
def test_gradcheck_of_forward_mode(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    arguments = arguments_of(module, inputs)
    function = as_function(module, inputs)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(dict(zip(arguments, values, strict=True))).values())

    leaves = tuple(t.requires_grad_() for t in arguments.values())
    options = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(
        outputs, leaves, check_forward_ad=True, check_batched_forward_grad=True, **options
    )
    assert torch.autograd.gradgradcheck(outputs, leaves, check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_dual_numbers_have_the_bits_of_plain_calls(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    function, arguments = as_function(module, inputs), arguments_of(module, inputs)
    expected = function(arguments)
    results = by_dual_numbers(function, arguments)
    assert_equal({name: results[name] for name in expected}, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "case", cases(L=[2], D=[2], P=[0, 3], batch_first=[False, True], dropout=[0, 0.5]), ids=str
)
def test_forward_mode_through_an_exported_module(case: Case, trained: bool) -> None:
    module = build(fastrnn, case).requires_grad_(trained)
    x = make_inputs(case).x
    program = torch.export.export(module, (x,)).module()
    program.mode = module.mode
    expected = with_tangent(lambda x: call(module, Inputs(x)), x)
    assert_same(with_tangent(lambda x: call(program, Inputs(x)), x), expected)
    torch.manual_seed(3)
    _, tangents = jvp(lambda x: call(program, Inputs(x)), (x,), (torch.ones_like(x),))
    assert_same(tangents, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_through_the_op_of_a_cell(kind: str, trained: bool) -> None:
    case = Case(kind, T=1)
    module, x = build(fastrnn, case).requires_grad_(trained), make_inputs(case).x

    def step(x: Tensor) -> Results:
        h, _ = torch.ops.fastrnn.cell(kind, x[0], None, None, module._flat_weights, True)
        return {"y": h}

    expected = with_tangent(lambda x: {"y": module(x)[0][0]}, x)
    assert_same(with_tangent(step, x), expected)


@pytest.mark.parametrize("case", cases(L=[2], dropout=[1.0]), ids=str)
def test_forward_mode_through_the_op_when_all_is_dropped(case: Case) -> None:
    module, x = build(fastrnn, case), make_inputs(case).x
    weights = list(module.requires_grad_(False).parameters())
    masks = draw_masks(case, x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y, *_ = torch.ops.fastrnn.recurrent(
            case.kind, dual, None, None, None, weights, 2, True, False, False, masks, 1.0
        )
        primal, tangent = forward_ad.unpack_dual(y)
    assert primal.isfinite().all()
    assert tangent is None or not tangent.any()


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_that_is_switched_off(kind: str, enabled: bool) -> None:
    module, x = build(fastrnn, Case(kind)), make_inputs(Case(kind)).x.requires_grad_()
    y = module(x)[0]
    with forward_ad.dual_level():
        dy, dual = (forward_ad.make_dual(t, torch.ones_like(t)) for t in (y.detach(), x))
        with forward_ad._set_fwd_grad_enabled(enabled):
            results = [module(dual)[0], *torch.autograd.grad(y, x, dy)]
        tangents = [forward_ad.unpack_dual(result).tangent for result in results]
    assert [tangent is not None for tangent in tangents] == [enabled] * 2


TANGENTS = [by_jvp, by_dual_numbers, by_jvp_of_grad]


@pytest.mark.parametrize("transform", TANGENTS)
@pytest.mark.parametrize(
    "case", cases(L=[2], D=[2], P=[0, 3], lengths=[None, (2, 7, 4)], hx=[True]), ids=str
)
def test_tangents_are_of_the_fused_run(case: Case, transform: Callable[..., Results]) -> None:
    module, inputs = build(fastrnn, case).requires_grad_(False), make_inputs(case)
    function, arguments = as_function(module, inputs), arguments_of(module, inputs)
    with torch.profiler.profile() as profile:
        transform(function, arguments)
    names = {event.name for event in profile.events()}
    assert "aten::addmm" in names
    assert not {"aten::linear", "aten::sigmoid", "aten::relu"} & names


@pytest.mark.parametrize("case", cases(H=[5], L=[2], D=[2], dtype=[torch.float64]), ids=str)
def test_tangents_have_gradients(case: Case) -> None:
    results = []
    for package in (fastrnn, nn):
        module, x = build(package, case), make_inputs(case).x.requires_grad_()
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, torch.ones_like(x)))[0]
            total = forward_ad.unpack_dual(y).tangent.sin().sum()
        wanted = {"x": x, **dict(module.named_parameters())}
        gradients = torch.autograd.grad(total, list(wanted.values()))
        results.append(dict(zip(wanted, gradients, strict=True)))
    assert_same(*results, factor=10)


@pytest.mark.parametrize("case", cases(H=[5], L=[2], dtype=[torch.float64]), ids=str)
def test_tangents_of_second_derivatives_without_a_graph(case: Case) -> None:
    """The fused run has none to give: the dual numbers are inside what torch.func has wrapped."""
    x = make_inputs(case).x

    def product(module: nn.RNNBase, x: Tensor) -> Results:
        gradient = grad(lambda x: module(x)[0].sin().sum())
        with torch.no_grad():
            return {"product": vjp(gradient, x)[1](torch.ones_like(x))[0]}

    ours, theirs = (
        with_tangent(partial(product, build(package, case)), x) for package in (fastrnn, nn)
    )
    assert_same(ours, theirs, factor=100)


def tangent_at_a_level(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A gradient of forward-mode AD at the gradient's own level."""

    def total(x: Tensor) -> Tensor:
        return with_tangent(lambda x: {"y": f(x)}, x)["y"].sin().sum()

    return grad(total)(x)


def gradients_at_a_level(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A third derivative, all of one level."""

    def total(x: Tensor) -> Tensor:
        value = f(x).sin().sum()
        for _ in range(2):
            (gradient,) = autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        return value

    return grad(total)(x)


def gradient_around_a_level(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A gradient of what jvp gives, by autograd outside."""
    leaf = x.clone().requires_grad_()
    tangent = jvp(f, (leaf,), (torch.ones_like(x),))[1]
    return autograd.grad(tangent.sin().sum(), leaf)[0]


def tangent_of_two_gradients(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A tangent of a gradient of a gradient, of which no graph is made."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        (once,) = autograd.grad(f(dual).sin().sum(), dual, create_graph=True)
        (twice,) = autograd.grad(once.square().sum(), dual)
        return forward_ad.unpack_dual(twice).tangent


DERIVATIVES = [
    tangent_at_a_level,
    gradients_at_a_level,
    gradient_around_a_level,
    tangent_of_two_gradients,
]


@pytest.mark.parametrize("derive", DERIVATIVES)
@pytest.mark.parametrize("name", ["x", "h0", "weight_hh_l0"])
@pytest.mark.parametrize(
    "case", cases(T=[4], N=[2], H=[5], L=[2], hx=[True], dtype=[torch.float64]), ids=str
)
def test_derivatives_have_derivatives_where_one_argument_does(
    case: Case, name: str, derive: Callable[..., Tensor]
) -> None:
    inputs, results = make_inputs(case), []
    for package in (fastrnn, nn):
        module = build(package, case).requires_grad_(False)
        given, function = arguments_of(module, inputs), as_function(module, inputs)
        found = derive(lambda t, g=given, f=function: f(g | {name: t})["y"], given[name])
        results.append({name: found})
    assert_same(*results, factor=100)
