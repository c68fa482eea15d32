"""A row's result depends on that row alone, bit for bit, whatever the batch."""

import pytest
import torch

import fastrnn
from helpers import DTYPES, Case, Inputs, assert_equal, build, call, cases, make_inputs

BATCHES = [
    *cases(N=[2, 5, 17], I=[7], H=[17], hx=[True], dtype=DTYPES),
    *cases(T=[3], N=[33], I=[33], H=[16, 130], L=[2], D=[2], hx=[True], dtype=DTYPES),
    *cases(["LSTM"], N=[7], H=[33], P=[1, 17], L=[2], D=[2], hx=[True], dtype=DTYPES),
    *cases(T=[40], N=[9], I=[4], H=[64], hx=[True]),
    *cases(N=[5], batch_first=[True], hx=[True]),
]


def rows(case: Case, inputs: Inputs, chosen: slice) -> Inputs:
    """Returns the rows `chosen` of a batch."""
    x = inputs.x[chosen] if case.batch_first else inputs.x[:, chosen]
    states = (None if state is None else state[:, chosen] for state in (inputs.h0, inputs.c0))
    return Inputs(x, None, *states)


def results_of_rows(case: Case, results: dict, chosen: slice) -> dict:
    """Returns the rows `chosen` of a batch's results."""
    first = ("y", "dx") if case.batch_first else ()
    return {name: t[chosen] if name in first else t[:, chosen] for name, t in results.items()}


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_inference(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        together = call(module, inputs)
        chosen = [slice(b, b + 1) for b in range(case.N)] + [slice(0, case.N // 2), slice(1, None)]
        for some in chosen:
            alone = call(module, rows(case, inputs, some))
            assert_equal(alone, results_of_rows(case, together, some))


def training_results(case: Case, inputs: Inputs, weights: torch.Tensor) -> dict:
    """Returns outputs and the gradients of `inputs`, for the loss sum(y * weights)."""
    leaves = Inputs(*(t if t is None else t.detach().clone().requires_grad_() for t in inputs))
    outputs = call(build(fastrnn, case), leaves)
    (outputs["y"] * weights).sum().backward()
    gradients = {"dx": leaves.x.grad, "dh0": leaves.h0.grad}
    if leaves.c0 is not None:
        gradients["dc0"] = leaves.c0.grad
    return {name: output.detach() for name, output in outputs.items()} | gradients


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_training(case: Case) -> None:
    inputs = make_inputs(case)
    weights = torch.randn_like(call(build(fastrnn, case), inputs)["y"])
    together = training_results(case, inputs, weights)
    for some in (slice(0, 1), slice(case.N - 1, None), slice(1, case.N // 2 + 1)):
        cut = results_of_rows(case, {"y": weights}, some)["y"]
        alone = training_results(case, rows(case, inputs, some), cut)
        assert_equal(alone, results_of_rows(case, together, some))


@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True], dtype=DTYPES), ids=str)
def test_inference_is_training(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    training = {name: output.detach() for name, output in call(module, inputs).items()}
    with torch.no_grad():
        assert_equal(call(module, inputs), training)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], dtype=DTYPES), ids=str)
def test_unbatched_is_a_batch_of_one(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        batched = call(module, Inputs(inputs.x[:, :1]))
        unbatched = call(module, Inputs(inputs.x[:, 0]))
    assert_equal(unbatched, {name: output[:, 0] for name, output in batched.items()})


@pytest.mark.parametrize("case", cases(L=[2], D=[2], dtype=DTYPES), ids=str)
def test_batch_first_is_time_first(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        expected = call(module, inputs)
        module.batch_first = True
        outputs = call(module, Inputs(inputs.x.transpose(0, 1)))
    outputs["y"] = outputs["y"].transpose(0, 1)
    assert_equal(outputs, expected)


@pytest.mark.parametrize("case", cases(dtype=DTYPES), ids=str)
def test_shorter_sequence_is_a_prefix(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        y = call(module, inputs)["y"]
        for length in range(1, case.T):
            prefix = call(module, Inputs(inputs.x[:length]))
            assert_equal({"y": prefix["y"]}, {"y": y[:length]})
