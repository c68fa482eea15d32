"""torch.func's transforms and forward-mode AD on the modules, held against torch.nn in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
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

Results = dict[str, Tensor]

CASES = [
    *cases(T=[4], N=[2], H=[5], L=[2], D=[2], P=[0, 3], hx=[True], dtype=DTYPES),
    *cases(T=[4], N=[2], H=[5], batch_first=[True], bias=[False]),
    *cases(T=[4], N=[None], H=[5], hx=[True]),
    *cases(T=[4], N=[3], H=[5], L=[2], D=[2], lengths=[(2, 4, 3)], hx=[True], dtype=DTYPES),
]


def arguments_of(module: nn.RNNBase, inputs: Inputs) -> dict[str, Tensor]:
    """Returns everything that the outputs can be differentiated by: x, h0, c0 and parameters."""
    given = {name: t for name, t in inputs._asdict().items() if isinstance(t, Tensor)}
    return given | {name: p.detach() for name, p in module.named_parameters()}


def pack(x: Tensor, lengths: tuple[int, ...]) -> PackedSequence:
    """Packs x (T, N, I) by indexing, which forward-mode AD takes and pack_padded_sequence not."""
    T, N = x.shape[:2]
    places = torch.arange(T * N).view(T, N)
    packed = pack_padded_sequence(places, list(lengths), enforce_sorted=False)
    return PackedSequence(x.flatten(0, 1)[packed.data], *packed[1:])


class Called(nn.Module):
    """A module on padded input and lengths, whose weights functional_call can put."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Inputs) -> Results:
        x, lengths, h0, c0 = inputs
        if lengths is None:
            return call(self.module, inputs)
        if isinstance(self.module, nn.LSTM | nn.RNN):
            return self.one_by_one(inputs)
        y, hidden = self.module(pack(x, lengths), h0 if c0 is None else (h0, c0))
        states = hidden if isinstance(hidden, tuple) else (hidden,)
        return {"y": y.data, **dict(zip(("h_n", "c_n"), states, strict=False))}

    def one_by_one(self, inputs: Inputs) -> Results:
        """What a packed sequence gives, of a module that is not transformed on one."""
        x, lengths, h0, c0 = inputs
        runs = [
            call(self.module, Inputs(x[:T, n], None, h0[:, n], c0 if c0 is None else c0[:, n]))
            for n, T in enumerate(lengths)
        ]
        padded = torch.nn.utils.rnn.pad_sequence([outputs.pop("y") for outputs in runs])
        states = {name: torch.stack([r[name] for r in runs], dim=1) for name in runs[0]}
        return {"y": pack(padded, lengths).data, **states}


def as_function(module: nn.RNNBase, inputs: Inputs) -> Callable[[Results], Results]:
    """Returns the map from `arguments_of(module, inputs)` to the outputs, differently weighted."""
    called = Called(module)

    def function(arguments: Results) -> Results:
        given = inputs._replace(**{n: t for n, t in arguments.items() if n in inputs._fields})
        weights = {f"module.{n}": t for n, t in arguments.items() if n not in inputs._fields}
        outputs = functional_call(called, weights, (given,))
        return {name: (i + 1) * t for i, (name, t) in enumerate(outputs.items())}

    return function


def directions(tensors: Results) -> Results:
    """Returns a fixed random direction for each of `tensors`."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for name, t in tensors.items()
    }


def total(outputs: Results) -> Tensor:
    """Returns a curved scalar function of all outputs."""
    return torch.stack([output.pow(2).sum() for output in outputs.values()]).sum()


def by_grad(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Gradients by torch.func.grad."""
    return grad(lambda a: total(f(a)))(arguments)


def by_vjp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Outputs and a vector-Jacobian product by torch.func.vjp."""
    outputs, pull = vjp(f, arguments)
    return outputs | {f"d{n}": g for n, g in pull(directions(outputs))[0].items()}


def by_jvp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Outputs and a Jacobian-vector product by torch.func.jvp."""
    outputs, tangents = jvp(f, (arguments,), (directions(arguments),))
    return outputs | {f"t{n}": t for n, t in tangents.items()}


def by_dual_numbers(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Outputs and a Jacobian-vector product by torch.autograd.forward_ad."""
    moves = directions(arguments)
    with forward_ad.dual_level():
        outputs = f({n: forward_ad.make_dual(t, moves[n]) for n, t in arguments.items()})
        duals = {n: forward_ad.unpack_dual(t) for n, t in outputs.items()}
        return {n: d.primal for n, d in duals.items()} | {
            f"t{n}": d.tangent for n, d in duals.items()
        }


def by_one_dual_number(f: Callable[[Results], Results], arguments: Results) -> Results:
    """A Jacobian-vector product where only a weight has a tangent."""
    name = "weight_hh_l0"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        outputs = f(arguments | {name: dual})
        return {n: forward_ad.unpack_dual(t).tangent for n, t in outputs.items()}


def by_grad_of_grad(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Gradients of a function of gradients."""
    return grad(lambda a: total(grad(lambda b: total(f(b)))(a)))(arguments)


def by_jvp_of_grad(f: Callable[[Results], Results], arguments: Results) -> Results:
    """A Hessian-vector product, forward over reverse."""
    return jvp(grad(lambda a: total(f(a))), (arguments,), (directions(arguments),))[1]


def by_grad_of_jvp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """A Hessian-vector product, reverse over forward."""
    moves = directions(arguments)
    return grad(lambda a: jvp(lambda b: total(f(b)), (a,), (moves,))[1])(arguments)


def by_jvp_of_jvp(f: Callable[[Results], Results], arguments: Results) -> Results:
    """Second directional derivatives."""
    moves = directions(arguments)
    return jvp(lambda a: jvp(f, (a,), (moves,))[1], (arguments,), (moves,))[1]


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
def test_hessian_of_a_sum(kind: str) -> None:
    # The gradient of a sum is one number, expanded: its memory overlaps.
    case = Case(kind, T=3, N=1, I=2, H=4, dtype=torch.float64)
    x, ours, theirs = make_inputs(case).x, build(fastrnn, case), build(nn, case)
    result = hessian(lambda x: ours(x)[0].sum())(x).detach()
    expected = autograd.functional.hessian(lambda x: theirs(x)[0].sum(), x)
    assert_same({"hessian": result}, {"hessian": expected}, factor=100)


@pytest.mark.parametrize("kind", KINDS)
def test_functionalize(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    f = functionalize(lambda x: module(x)[0])
    assert_same({"y": f(inputs.x)}, {"y": module(inputs.x)[0]})
    dx = functionalize(grad(lambda x: module(x)[0].square().sum()))(inputs.x)
    assert_same({"dx": dx}, {"dx": grad(lambda x: module(x)[0].square().sum())(inputs.x)})


def with_tangent(function: Callable[[Tensor], Results], x: Tensor) -> Results:
    """Returns the tangents of function's results, for a tangent of ones at x."""
    torch.manual_seed(3)
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(x, torch.ones_like(x)))
        return {name: forward_ad.unpack_dual(t).tangent for name, t in outputs.items()}


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
def test_values_of_dual_numbers_have_the_bits_of_plain_calls(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    function, arguments = as_function(module, inputs), arguments_of(module, inputs)
    expected = function(arguments)
    results = by_dual_numbers(function, arguments)
    assert_equal({name: results[name] for name in expected}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_is_called_again_after_a_transform(kind: str) -> None:
    case = Case(kind, L=2)
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    by_grad(as_function(module, inputs), arguments_of(module, inputs))
    assert_equal(run(module, inputs), expected)
    assert takes_fused_path(lambda: call(module, inputs))


@pytest.mark.parametrize("case", cases(L=[2], dropout=[1.0]), ids=str)
def test_forward_mode_through_the_op_when_all_is_dropped(case: Case) -> None:
    module, x = build(fastrnn, case), make_inputs(case).x
    weights = list(module.requires_grad_(False).parameters())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y, *_ = torch.ops.fastrnn.recurrent(
            case.kind, dual, None, None, None, weights, 2, True, False, False, 1.0
        )
        primal, tangent = forward_ad.unpack_dual(y)
    assert primal.isfinite().all()
    assert tangent is None or not tangent.any()


def test_a_sample_is_checked_as_it_was_given() -> None:
    """And not as vmap's samples are folded together."""
    weights = list(build(fastrnn, Case("RNN_TANH")).requires_grad_(False).parameters())
    x, h0 = torch.randn(4, 7, 3, 5), torch.zeros(1, 12, 17)

    def run(x: Tensor) -> Tensor:
        arguments = ("RNN_TANH", x, None, h0, None, weights, 1, True, False, False, 0.0)
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
