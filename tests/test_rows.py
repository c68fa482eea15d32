"""A row's result depends on that row alone, bit for bit, whatever the batch.

test_isa.py runs this file under each instruction set.
"""

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from helpers import (
    DTYPES,
    FUSED_DTYPES,
    HALF_DTYPES,
    Case,
    Inputs,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    random_weights,
    run_weighted,
)

BATCHES = [
    *cases(N=[2, 5, 17], I=[7], H=[17], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[3], N=[33], I=[33], H=[16, 130], L=[2], D=[2], hx=[True], dtype=FUSED_DTYPES),
    *cases(["LSTM"], N=[7], H=[33], P=[1, 17], L=[2], D=[2], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[40], N=[9], I=[4], H=[64], hx=[True]),
    # Alone, a row's weights are read in place; together they are packed.
    *cases(T=[1], N=[7, 13], I=[5], H=[8, 130], hx=[True], dtype=FUSED_DTYPES),
    # So they are at several steps, and at one by up to three blocks of rows; widths of a span of
    # 256 and a rest, whole panels and a part.
    *cases(T=[1, 2], N=[7, 17], I=[520], H=[272], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[3], N=[6], I=[259], H=[275], hx=[True], dtype=FUSED_DTYPES),
    *cases(["LSTM"], T=[2], N=[6], I=[256], H=[300], P=[290], hx=[True], dtype=FUSED_DTYPES),
    # Where two 16-bit numbers are an operand a span is 512 of them, and odd rows are packed.
    *cases(T=[1, 3], N=[6], I=[513, 1040], H=[528], hx=[True], dtype=HALF_DTYPES),
    # Weights are read in place, but for those of x where it has more than 24 rows in all.
    *cases(["LSTM"], T=[4, 5, 8], N=[5], I=[256, 300], H=[256], hx=[True], dtype=FUSED_DTYPES),
    # So many weights that a single row fetches those that it reads next.
    *cases(["LSTM"], T=[1, 2], N=[2], I=[1030], H=[1024]),
    # Together, x is multiplied ahead for 128 rows at a time, for the sake of so many weights.
    *cases(["LSTM"], T=[23], N=[9, 31], I=[70], H=[300], hx=[True], dtype=FUSED_DTYPES),
    *cases(["RNN_TANH"], T=[23], N=[9, 31], I=[200], H=[500], hx=[True], dtype=FUSED_DTYPES),
    # x of all steps is multiplied ahead at once, w_ih packed as it is used, and read in place for
    # dx; of 550 rows it is not.
    *cases(T=[5], N=[9, 110], I=[280], H=[130], hx=[True], dtype=FUSED_DTYPES),
    # Together, gradients of more than 1,024 pre-activations are multiplied 512 at a time, for 72
    # rows and then for two (AVX2).
    *cases(["LSTM"], T=[3], N=[74], I=[5], H=[270], hx=[True], dtype=FUSED_DTYPES),
    # Alone, a row's steps are one chunk of the backward pass; together they are two.
    *cases(T=[40], N=[29], I=[3], H=[17], hx=[True], dtype=FUSED_DTYPES),
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


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_training(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    weights = random_weights(call(module, inputs))
    together = run_weighted(module, inputs, weights)
    for some in (slice(0, 1), slice(case.N - 1, None), slice(1, case.N // 2 + 1)):
        cut = results_of_rows(case, weights, some)
        alone = run_weighted(module, rows(case, inputs, some), cut)
        assert_equal(alone, results_of_rows(case, together, some))


@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True], dtype=FUSED_DTYPES), ids=str)
def test_inference_is_training(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    training = {name: output.detach() for name, output in call(module, inputs).items()}
    with torch.no_grad():
        assert_equal(call(module, inputs), training)


@pytest.mark.parametrize("case", cases(L=[2], D=[2], dtype=FUSED_DTYPES), ids=str)
def test_unbatched_is_a_batch_of_one(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        batched = call(module, Inputs(inputs.x[:, :1]))
        unbatched = call(module, Inputs(inputs.x[:, 0]))
    assert_equal(unbatched, {name: output[:, 0] for name, output in batched.items()})


@pytest.mark.parametrize("case", cases(L=[2], D=[2], dtype=FUSED_DTYPES), ids=str)
def test_batch_first_is_time_first(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        expected = call(module, inputs)
        module.batch_first = True
        outputs = call(module, Inputs(inputs.x.transpose(0, 1)))
    outputs["y"] = outputs["y"].transpose(0, 1)
    assert_equal(outputs, expected)


@pytest.mark.parametrize("case", cases(N=[1, 3, 13], dtype=FUSED_DTYPES), ids=str)
def test_shorter_sequence_is_a_prefix(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        y = call(module, inputs)["y"]
        for length in range(1, case.T):
            prefix = call(module, Inputs(inputs.x[:length]))
            assert_equal({"y": prefix["y"]}, {"y": y[:length]})


def run_step_by_step(module: nn.RNNBase, inputs: Inputs) -> dict[str, Tensor]:
    """Calls `module` once a step, on the state that the last call left."""
    y, state = [], {"h_n": inputs.h0, "c_n": inputs.c0}
    for frame in inputs.x.split(1):
        state |= call(module, Inputs(frame, None, state["h_n"], state["c_n"]))
        y.append(state.pop("y"))
    return {"y": torch.cat(y), **{name: t for name, t in state.items() if t is not None}}


STREAMS = [
    *cases(N=[1, 13], H=[17, 130], L=[1, 2], hx=[True], dtype=DTYPES),
    *cases(["LSTM"], H=[33], P=[17], L=[2], hx=[True], dtype=DTYPES),
    *cases(
        ["RNN_TANH", "RNN_RELU"], N=[1, 13], H=[17, 130], L=[1, 2], dtype=HALF_DTYPES, hx=[True]
    ),
]


@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_steps_one_by_one(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        assert_equal(run_step_by_step(module, inputs), call(module, inputs))


@pytest.mark.parametrize(
    "case", cases(["LSTM"], H=[17], L=[2], hx=[True], dtype=HALF_DTYPES), ids=str
)
def test_steps_one_by_one_in_16_bits(case: Case) -> None:
    """An LSTM's c is rounded between calls, but not between the steps of one."""
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        assert_same(run_step_by_step(module, inputs), call(module, inputs))
