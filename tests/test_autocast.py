"""Autocast on the CPU: dtypes as torch.nn's, values as near, training, and GradScaler."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils._pytree import tree_map

import fastrnn
from helpers import (
    KINDS,
    Case,
    Inputs,
    assert_equal,
    build,
    call,
    cases,
    make_inputs,
    run,
    run_python,
    takes_fused_path,
)

assert_exact = partial(torch.testing.assert_close, rtol=0, atol=0)

LOWER = [torch.bfloat16, torch.float16]
GIVEN = [torch.float32, torch.float64, *LOWER]


def cast(inputs: Inputs, x: torch.dtype, states: torch.dtype) -> Inputs:
    """Returns `inputs` with x and the states in those dtypes."""
    return Inputs(
        inputs.x.to(x),
        inputs.lengths,
        *(None if state is None else state.to(states) for state in inputs[2:]),
    )


def dtypes(module: nn.RNNBase, inputs: Inputs) -> dict[str, torch.dtype] | None:
    """Returns the dtypes of the outputs, or None where torch raises."""
    try:
        return {name: output.dtype for name, output in call(module, inputs).items()}
    except RuntimeError:
        return None


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *cases(L=[2], P=[0, 3], lengths=[None, (2, 7, 4), (7, 7, 7)], hx=[False, True]),
        *cases(N=[1], lengths=[(7,)]),
        *cases(N=[0]),
    ],
    ids=str,
)
def test_same_dtypes(case: Case, lower: torch.dtype) -> None:
    compared = 0
    for weights in GIVEN:
        ours, theirs = (build(package, case).to(weights) for package in (fastrnn, nn))
        for x in GIVEN:
            for states in GIVEN if case.hx else [x]:
                inputs = cast(make_inputs(case), x, states)
                with torch.autocast("cpu", dtype=lower):
                    expected = dtypes(theirs, inputs)
                    if expected is not None:
                        assert dtypes(ours, inputs) == expected, (weights, x, states)
                        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("case", cases(["LSTM"], hx=[False, True]), ids=str)
def test_same_dtypes_without_onednn(case: Case, lower: torch.dtype) -> None:
    ours, theirs = (build(package, case) for package in (fastrnn, nn))
    compared = 0
    with torch.backends.mkldnn.flags(enabled=False), torch.autocast("cpu", dtype=lower):
        for states in GIVEN if case.hx else [torch.float32]:
            inputs = cast(make_inputs(case), torch.float32, states)
            expected = dtypes(theirs, inputs)
            if expected is not None:
                assert dtypes(ours, inputs) == expected, states
                compared += 1
    assert compared


@pytest.mark.parametrize("N", [None, 2])
@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("name", ["LSTMCell", "RNNCell"])
def test_cells_have_the_same_dtypes(name: str, lower: torch.dtype, N: int | None) -> None:
    batch = () if N is None else (N,)
    for given in GIVEN:
        ours, theirs = (getattr(package, name)(5, 8).to(given) for package in (fastrnn, nn))
        for states in GIVEN:
            h = torch.ones(*batch, 8, dtype=states)
            hx: Any = (h, h) if name == "LSTMCell" else h
            x = torch.ones(*batch, 5, dtype=given)
            with torch.autocast("cpu", dtype=lower):
                try:
                    expected = theirs(x, hx)
                except RuntimeError:
                    continue
                got = ours(x, hx)
            pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
            assert all(mine.dtype == other.dtype for mine, other in pairs), (given, states)


# A product in the lower precision is off by up to half an ulp of its largest terms; a few of them
# add up over the steps. A gradient of relu jumps where a rounding turns a sign, so there
# whole tensors are compared, and held to twice torch.nn's own error if that is more.
ROUNDINGS = 8


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize(
    "case", cases(L=[2], D=[2], P=[0, 3], lengths=[None, (2, 7, 4)], hx=[True]), ids=str
)
def test_results_and_gradients(case: Case, lower: torch.dtype) -> None:
    module, theirs, inputs = build(fastrnn, case), build(nn, case), make_inputs(case)
    expected = run(theirs, inputs)
    with torch.autocast("cpu", dtype=lower):
        results = run(module, inputs)
        results_nn = run(theirs, inputs) if case.kind == "RNN_RELU" else {}
        assert takes_fused_path(lambda: call(module, inputs))
    for name, want in expected.items():
        got, tolerance = results[name].float(), ROUNDINGS * torch.finfo(lower).eps
        if case.kind == "RNN_RELU":
            error_nn = (results_nn[name].float() - want).norm()
            assert (got - want).norm() <= max(tolerance * want.norm(), 2 * error_nn), name
        else:
            atol = tolerance * max(1.0, want.abs().max().item())
            torch.testing.assert_close(got, want, rtol=0, atol=atol)


def call_on(module: nn.RNNBase, inputs: Inputs, x: Tensor) -> dict[str, Tensor]:
    return call(module, inputs._replace(x=x))


def inputs_of_samples(case: Case) -> list[Inputs]:
    return [make_inputs(case, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("states", [torch.float32, *LOWER], ids=str)
@pytest.mark.parametrize("case", cases(L=[2], P=[0, 3], hx=[False, True]), ids=str)
def test_vmap(case: Case, states: torch.dtype, lower: torch.dtype) -> None:
    module = build(fastrnn, case)
    each = [cast(inputs, torch.float32, states) for inputs in inputs_of_samples(case)]
    given = [name for name, value in each[0]._asdict().items() if value is not None]

    def function(*tensors: Tensor) -> dict[str, Tensor]:
        return call(module, Inputs(**{**empty, **dict(zip(given, tensors, strict=True))}))

    empty = dict.fromkeys(Inputs._fields)
    stacked = [torch.stack([getattr(inputs, name) for inputs in each]) for name in given]
    with torch.autocast("cpu", dtype=lower):
        expected = [call(module, inputs) for inputs in each]
        results = vmap(function)(*stacked)
        assert takes_fused_path(lambda: vmap(function)(*stacked))
    assert_equal(results, {n: torch.stack([outputs[n] for outputs in expected]) for n in results})


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("name", ["LSTMCell", "RNNCell"])
def test_vmap_of_cells(name: str, lower: torch.dtype) -> None:
    cell, x = getattr(fastrnn, name)(5, 8), torch.randn(3, 2, 5)
    with torch.autocast("cpu", dtype=lower):
        assert_exact(vmap(cell)(x), tree_map(lambda *s: torch.stack(s), *map(cell, x)))


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind: str, lower: torch.dtype) -> None:
    case = Case(kind, L=2)
    module = build(fastrnn, case)
    x = torch.stack([inputs.x for inputs in inputs_of_samples(case)])
    weights = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=lower):
            return functional_call(module, weights, (x,))[0].float().square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(loss(weights, sample), list(weights.values()))
        for name, want in zip(weights, expected, strict=True):
            assert_exact(gradients[name][i], want)


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("case", cases(L=[2], P=[0, 3]), ids=str)
def test_tangents(case: Case, lower: torch.dtype) -> None:
    module, x = build(fastrnn, case), make_inputs(case).x

    def tangent() -> tuple[Tensor, Tensor]:
        return jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))

    expected = tangent()
    with torch.autocast("cpu", dtype=lower):
        got, y = tangent(), module(x)[0]
    assert_exact(got[0], y)
    tolerance = ROUNDINGS * torch.finfo(lower).eps * max(1.0, expected[1].abs().max().item())
    torch.testing.assert_close(got[1].float(), expected[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *cases(L=[2], D=[1, 2], P=[0, 3], lengths=[None, (2, 7, 4)], hx=[True]),
        *cases(lengths=[(7, 7, 7)], hx=[True]),
        *cases(N=[0], hx=[True]),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_transforms_leave_the_results(bias: bool, case: Case, lower: torch.dtype) -> None:
    case, compared = replace(case, bias=bias), 0
    for weights in GIVEN:
        module = build(fastrnn, case).to(weights)
        for states in GIVEN:
            inputs = cast(make_inputs(case), weights, states)
            with torch.autocast("cpu", dtype=lower):
                if dtypes(module, inputs) is not None:
                    outputs, _ = vjp(partial(call_on, module, inputs), inputs.x)
                    assert_equal(outputs, call(module, inputs))
                    compared += 1
    assert compared >= len(GIVEN)


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("name", ["LSTMCell", "RNNCell"])
def test_transforms_leave_the_results_of_cells(name: str, lower: torch.dtype) -> None:
    cell, x = getattr(fastrnn, name)(5, 8), torch.ones(3, 5)
    with torch.autocast("cpu", dtype=lower):
        assert_exact(vjp(cell, x)[0], cell(x))


@pytest.mark.parametrize("kind", KINDS)
def test_pulling_back_under_autocast_rounds_nothing(kind: str) -> None:
    module, x = build(fastrnn, Case(kind)), make_inputs(Case(kind)).x

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    def pulled(function: Callable[[Tensor], Tensor], lowered: bool) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            y, pull = vjp(function, x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
                return pull(torch.ones_like(y))[0]

        return of

    for function in (loss, grad(loss)):
        exact, rounded = (pulled(function, lowered) for lowered in (False, True))
        assert_exact(rounded(x), exact(x))
        assert_exact(jvp(rounded, (x,), (x.cos(),)), jvp(exact, (x,), (x.cos(),)))


def test_autocast_of_another_device() -> None:
    module, x = build(fastrnn, Case("LSTM")), make_inputs(Case("LSTM")).x
    expected = module(x)[0]
    torch.set_autocast_enabled("cuda", True)
    try:
        result = vmap(lambda x: module(x)[0], in_dims=1, out_dims=1)(x)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert_exact(result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_disabled_inside(kind: str) -> None:
    module, inputs = build(fastrnn, Case(kind)), make_inputs(Case(kind))
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        results = call(module, inputs)
    for name, want in call(module, inputs).items():
        assert torch.equal(results[name], want)


@pytest.mark.parametrize("lower", LOWER, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_with_a_scaler(kind: str, lower: torch.dtype) -> None:
    case = Case(kind, L=2, batch_first=True)
    module, x = build(fastrnn, case), make_inputs(case).x
    target = torch.randn(3, 7, 17, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=lower):
            loss = (module(x)[0] - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert losses[-1] < 0.95 * losses[0]
    assert scaler.get_scale() == 2.0**8  # no step was skipped


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    case = Case(kind, L=2, lengths=(2, 7, 4))
    inputs = make_inputs(case)
    module, compiled = build(fastrnn, case), build(fastrnn, case)
    torch._dynamo.reset()
    compiled.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = run(module, inputs), run(compiled, inputs)
    torch._dynamo.reset()
    for name, want in expected.items():
        assert got[name].dtype == want.dtype
        torch.testing.assert_close(got[name], want)


@pytest.mark.parametrize("op", ["recurrent", "cell"])
def test_cuda_key(op: str) -> None:
    # What it gives takes a GPU to see; that it is there does not.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrnn::{op}", "AutocastCUDA")


def test_a_trace_as_the_first_call() -> None:
    code = """if True:
        import torch, fastrnn
        x, module = torch.ones(4, 3, 5), fastrnn.LSTM(5, 8)
        with torch.autocast("cpu", torch.bfloat16):
            traced = torch.jit.trace(module, x, check_trace=False)
            assert torch.equal(traced(2 * x)[0], module(2 * x)[0])
    """
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
