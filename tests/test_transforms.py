"""torch.func's transforms on the modules, held against torch.nn in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize, grad, jvp, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from derivatives import (
    Called,
    Results,
    arguments_of,
    as_function,
    by_dual_numbers,
    by_grad,
    by_grad_of_grad,
    by_grad_of_jvp,
    by_jvp,
    by_jvp_of_grad,
    by_jvp_of_jvp,
    by_one_dual_number,
    by_vjp,
)
from fastrnn import _transforms
from helpers import (
    DTYPES,
    KINDS,
    Case,
    Inputs,
    Recorder,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    loss,
    make_inputs,
    run,
    takes_fused_path,
)

CASES = [
    *cases(T=[4], N=[2], H=[5], L=[2], D=[2], P=[0, 3], hx=[True], dtype=DTYPES),
    *cases(T=[4], N=[2], H=[5], batch_first=[True], bias=[False]),
    *cases(T=[4], N=[None], H=[5], hx=[True]),
    *cases(T=[4], N=[3], H=[5], L=[2], D=[2], lengths=[(2, 4, 3)], hx=[True], dtype=DTYPES),
]

FIRST = [by_grad, by_vjp, by_jvp, by_dual_numbers, by_one_dual_number]

SECOND = [by_grad_of_grad, by_jvp_of_grad, by_grad_of_jvp, by_jvp_of_jvp]


def as_in_float64(transform: Callable[..., Results], case: Case) -> Results:
    """Returns what `transform` makes of torch.nn's float64 module, in `case`'s dtype."""
    double = replace(case, dtype=torch.float64)
    module, inputs = build(nn, double), make_inputs(case)
    module.load_state_dict(build(nn, case).state_dict())
    inputs = Inputs(*(t.double() if isinstance(t, Tensor) else t for t in inputs))
    results = transform(as_function(module, inputs), arguments_of(module, inputs))
    return {name: t.to(case.dtype) for name, t in results.items()}


@pytest.mark.parametrize("transform", FIRST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_derivatives(case: Case, transform: Callable[..., Results]) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    results = transform(as_function(module, inputs), arguments_of(module, inputs))
    assert_same(results, as_in_float64(transform, case), factor=10)


@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float64], ids=str)
def test_second_derivatives(case: Case, transform: Callable[..., Results]) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    results = transform(as_function(module, inputs), arguments_of(module, inputs))
    assert_same(results, as_in_float64(transform, case), factor=100)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_inside_a_transform(kind: str) -> None:
    case = Case(kind, T=4, N=3, H=5, lengths=(2, 4, 3), dtype=torch.float64)
    module, inputs = build(fastrnn, case), make_inputs(case)

    def loss(weights: Results) -> Tensor:
        x = pack_padded_sequence(inputs.x, [2, 4, 3], enforce_sorted=False)
        return functional_call(module, weights, (x,))[0].data.square().sum()

    gradients = grad(loss)({name: p.detach() for name, p in module.named_parameters()})
    call(module, inputs)["y"].square().sum().backward()
    assert_same(gradients, {name: p.grad for name, p in module.named_parameters()})


@pytest.mark.parametrize("kind", KINDS)
def test_functionalize(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    f = functionalize(lambda x: module(x)[0])
    assert_same({"y": f(inputs.x)}, {"y": module(inputs.x)[0]})
    dx = functionalize(grad(lambda x: module(x)[0].square().sum()))(inputs.x)
    assert_same({"dx": dx}, {"dx": grad(lambda x: module(x)[0].square().sum())(inputs.x)})


DROPPED = [
    *cases(L=[3], D=[1, 2], batch_first=[False, True]),
    *cases(L=[3], D=[2], N=[None], batch_first=[True], hx=[True]),
    *cases(L=[3], D=[2], P=[0, 3], lengths=[(2, 7, 4)], hx=[True]),
]


@pytest.mark.parametrize("dropout", [0.5, 1.0])
@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropout_draws_torch_nn_masks(case: Case, dropout: float) -> None:
    case = replace(case, dropout=dropout)
    inputs, called = make_inputs(case), Called(build(fastrnn, case))

    def total_loss(given: Results) -> tuple[Tensor, Results]:
        outputs = called(inputs._replace(**given))
        return loss(outputs, outputs), outputs

    given = {name: t for name, t in inputs._asdict().items() if isinstance(t, Tensor)}
    torch.manual_seed(2)
    gradients, results = grad(total_loss, has_aux=True)(given)
    results |= {f"d{name}": gradient for name, gradient in gradients.items()}
    expected = run(build(nn, case), inputs, seed=2)
    assert_same(results, {name: expected[name] for name in results})


REJECTED: dict[str, Callable[[nn.Module], Tensor]] = {
    "features": lambda module: grad(lambda x: module(x)[0].sum())(torch.ones(4, 3, 6)),
    "packed_samples": lambda module: vmap(
        vmap(lambda x: module(pack_padded_sequence(x, [4, 2, 1]))[0].data)
    )(torch.ones(2, 2, 4, 3, 5)),
}


@pytest.mark.parametrize("action", REJECTED.values(), ids=REJECTED)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_rejected_in_torch_nn_words(
    kind: str, action: Callable[[nn.Module], Tensor]
) -> None:
    messages = []
    for package in (fastrnn, nn):
        with pytest.raises(RuntimeError) as error:
            action(build(package, Case(kind)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", KINDS)
def test_first_derivatives_are_fused(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    function, arguments = as_function(module, inputs), arguments_of(module, inputs)
    with (
        torch.profiler.profile() as profile,
        Recorder("fastrnn::recurrent_forward") as forward,
        Recorder("fastrnn::recurrent_backward") as backward,
    ):
        by_grad(function, arguments)
    assert len(forward.calls) == len(backward.calls) == 1
    assert "aten::linear" not in {event.name for event in profile.events()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_is_called_again_after_a_transform(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    by_grad(as_function(module, inputs), arguments_of(module, inputs))
    assert_equal(run(module, inputs), expected)
    assert takes_fused_path(lambda: call(module, inputs))


def test_a_sample_is_checked_as_it_was_given() -> None:
    """And not as vmap's samples are folded together."""
    weights = list(build(fastrnn, Case("RNN_TANH")).requires_grad_(False).parameters())
    x, h0 = torch.randn(4, 7, 3, 5), torch.zeros(1, 12, 17)

    def run(x: Tensor) -> Tensor:
        arguments = ("RNN_TANH", x, None, h0, None, weights, 1, True, False, False, None, 0.0)
        return _transforms.recurrent(*arguments)[0]

    with pytest.raises(RuntimeError, match=r"h0 must have size \[1, 3, 17\]"):
        torch.vmap(run)(x)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_to_the_output(kind: str) -> None:
    module, x = build(fastrnn, Case(kind)), make_inputs(Case(kind)).x
    written = grad(lambda x: module(x)[0].mul_(2).square().sum())(x)
    torch.testing.assert_close(written, grad(lambda x: (2 * module(x)[0]).square().sum())(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_the_backward_pass(kind: str) -> None:
    module, x = build(fastrnn, Case(kind)), make_inputs(Case(kind)).x
    y, pull = vjp(lambda x: module(x)[0], x)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            _, (tangent,) = jvp(pull, (y.cos(),), (y.sin(),))
        results.append({"tangent": tangent})
    assert_equal(*results)
