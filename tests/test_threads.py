"""Results and gradients do not depend on the number of threads, bit for bit.

test_isa.py runs this file under each instruction set, test_load.py on a busy machine.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from helpers import (
    DTYPES,
    FUSED_DTYPES,
    HALF_DTYPES,
    MANY_ROWS,
    Case,
    Inputs,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    run,
    run_python,
)

pytestmark = pytest.mark.usefixtures("threads_as_asked")

# csrc/plan.cpp takes another thread for each 1e6 floating-point operations; here no case is near.
FLOPS_PER_THREAD = 2e6

# Layers that run at the same time, each a block of steps behind the one below.
DIAGONAL = [
    *cases(T=[160], N=[1], I=[70], H=[70], L=[2], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[40], N=[3], I=[70], H=[70], L=[3], bias=[False], dtype=FUSED_DTYPES),
    *cases(["LSTM"], T=[32], N=[2], I=[70], H=[70], P=[17], L=[4], dtype=FUSED_DTYPES),
    *cases(T=[40], N=[7], lengths=[(13, 40, 1, 40, 2, 27, 40)], I=[33], H=[70], L=[3], hx=[True]),
    *cases(T=[31], N=[5], I=[70], H=[70], L=[2], batch_first=[True]),
    *cases(T=[150], N=[None], I=[33], H=[70], L=[3]),
]

SEVERAL_THREADS = [
    *DIAGONAL,
    # By rows.
    *cases(T=[40], N=[13], I=[751], H=[8, 17, 33], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[20], N=[13], I=[77], H=[130], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[9], N=[33], I=[33], H=[64], L=[2], D=[2], P=[0, 17]),
    *cases(T=[40], N=[2], I=[201], H=[130], hx=[True], dtype=FUSED_DTYPES),
    # By hidden units, which need a barrier at each step.
    *cases(T=[40], N=[1, 7], I=[17], H=[300], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[5], N=[9], I=[500], H=[200], hx=[True], dtype=FUSED_DTYPES),
    *cases(["LSTM"], T=[1, 3], N=[11], I=[300], H=[430], P=[33, 200], dtype=FUSED_DTYPES),
    *cases(["LSTM"], T=[5], N=[5], lengths=[(2, 5, 1, 5, 2)], I=[300], H=[430], P=[200], D=[1, 2]),
    # By direction, if two.
    *cases(T=[20], N=[5], I=[35], H=[130], L=[2], D=[2], dtype=FUSED_DTYPES),
    *cases(T=[2], N=[3], I=[701], H=[700], D=[2]),
    *cases(["LSTM"], T=[20], N=[1, 5], I=[135], H=[130], P=[33], D=[2], dtype=FUSED_DTYPES),
    *cases(T=[40], N=[7], lengths=[(13, 40, 1, 40, 2, 27, 40)], I=[33], H=[130], D=[2]),
    *cases(T=[40], N=[7], lengths=[(13, 40, 1, 40, 2, 27, 40)], I=[33], H=[300], hx=[True]),
    *cases(T=[20], L=[2], N=[6], I=[65], H=[300], dropout=[0.5]),
    # Dropout is drawn between layers, which cannot run at the same time then.
    *cases(T=[400], N=[1], I=[70], H=[70], L=[2], dropout=[0.5]),
    # By rows of very different lengths, which threads convert to memory of their own.
    *cases(T=[40], N=[23], lengths=[(40,) * 3 + (2,) * 20], I=[77], H=[130], dtype=HALF_DTYPES),
    # By rows, of which one thread's begin late in the reverse direction, x multiplied ahead.
    *cases(
        ["RNN_TANH"], T=[40], N=[7], lengths=[(40, 40, 20, 20, 2, 2, 2)], I=[751], H=[16], D=[2]
    ),
    *MANY_ROWS,
]

# By rows, of each of which a step leaves little, of whole and unfinished blocks of steps.
LITTLE_ROWS = [
    *cases(T=[17], N=[33], I=[131], H=[40], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[40], N=[23], I=[131], H=[40], L=[2], batch_first=[False, True]),
    *cases(["LSTM"], T=[24], N=[33], I=[101], H=[70], P=[17], D=[1, 2]),
    *cases(T=[9], N=[33], I=[201], H=[33], L=[2], D=[2], hx=[True]),
    *cases(T=[2], N=[250], I=[901], H=[11]),
]

EDGES = [
    *cases(T=[9], N=[1, 2], I=[7], H=[33, 130], hx=[True]),
    *cases(T=[9], N=[5], H=[33], D=[2], lengths=[(3, 9, 1, 9, 2)], P=[0, 5]),
    *cases(T=[200], N=[1], I=[3], H=[64]),
    *cases(N=[None], H=[48], L=[3]),
    *cases(N=[0], H=[48]),
]


def flops(case: Case) -> float:
    """Returns the operations of a layer's forward pass; of all layers, on the diagonal."""
    gates = case.H * (4 if case.kind == "LSTM" else 1)
    rows = sum(case.lengths) if case.lengths else case.T * (case.N or 1)
    layer = 2.0 * rows * gates * (case.I + (case.P or case.H)) * case.D
    return layer * (case.L if case in DIAGONAL else 1)


@pytest.mark.parametrize("case", [*SEVERAL_THREADS, *EDGES], ids=str)
def test_thread_counts(case: Case) -> None:
    if case in SEVERAL_THREADS:
        assert flops(case) >= 3 * FLOPS_PER_THREAD
    inputs = make_inputs(case)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(build(fastrnn, case), inputs))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("case", LITTLE_ROWS, ids=str)
def test_distant_cores(case: Case) -> None:
    """Each thread then keeps its rows of a few steps in memory of its own."""
    assert flops(case) >= 3 * FLOPS_PER_THREAD
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    torch.ops.fastrnn.assume_distant(True)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_equal(run(module, inputs), expected)
        with torch.no_grad():
            found = call(module, inputs)
        assert_equal(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("case", [case for case in DIAGONAL if case.N == 7], ids=str)
def test_rows_alone(case: Case) -> None:
    inputs = make_inputs(case)
    torch.set_num_threads(2)
    whole = call(build(fastrnn, case), inputs)
    for n in range(case.N):
        row = slice(n, n + 1)
        states = [None if t is None else t[:, row].contiguous() for t in (inputs.h0, inputs.c0)]
        alone = inputs._replace(x=inputs.x[: case.lengths[n], row], lengths=None)
        alone = alone._replace(h0=states[0], c0=states[1])
        found = call(build(fastrnn, case), alone)
        assert_equal(
            {name: found[name] for name in found if name != "y"},
            {name: whole[name][:, row] for name in found if name != "y"},
        )


# Both directions' backward passes at the same time, which meet at the middle of the sequence: in
# the first chunk, between two, and in one of many.
SIDE_BY_SIDE = [
    *cases(T=[9, 10], N=[23], I=[80], H=[65], L=[2], D=[2], hx=[True], dtype=FUSED_DTYPES),
    *cases(T=[31, 32], N=[33], I=[40], H=[65], D=[2], dtype=FUSED_DTYPES),
    *cases(T=[201], N=[9], I=[40], H=[65], D=[2], batch_first=[True]),
    *cases(T=[1, 2], N=[131], I=[90], H=[90], L=[2], D=[2]),
    *cases(T=[60], N=[30], I=[40], H=[65], D=[2], lengths=[tuple(60 - n % 40 for n in range(30))]),
    *cases(["LSTM"], T=[31], N=[33], I=[40], H=[65], P=[17], L=[2], D=[2]),
]


@pytest.mark.parametrize("case", SIDE_BY_SIDE, ids=str)
def test_backward_of_directions_side_by_side(case: Case) -> None:
    assert flops(case) >= 3 * FLOPS_PER_THREAD
    module, inputs = build(fastrnn, case), make_inputs(case)

    def run_weights() -> dict[str, Tensor]:
        module.zero_grad()
        y = call(module, inputs)["y"]
        y.backward(y.detach())
        return {name: weight.grad for name, weight in module.named_parameters()}

    torch.set_num_threads(1)
    expected, weights = run(module, inputs), run_weights()
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_equal(run(module, inputs), expected)
        assert_equal(run_weights(), weights)


@pytest.mark.parametrize(
    "case", cases(T=[40], N=[1], I=[300], H=[120, 300], D=[2], hx=[True]), ids=str
)
def test_directions_and_hidden_units_divided(case: Case) -> None:
    """Four threads, two a direction, each pair with a barrier of its own."""
    module, inputs = build(fastrnn, case), make_inputs(case)
    expected = run(module, inputs)
    torch.set_num_threads(4)
    for _ in range(5):
        assert_equal(run(module, inputs), expected)


FIVE_LAYERS = cases(T=[40], N=[7], lengths=[(13, 40, 1, 40, 2, 27, 40)], I=[33], H=[70], L=[5])


@pytest.mark.parametrize("case", FIVE_LAYERS, ids=str)
def test_inference_along_the_diagonal(case: Case) -> None:
    """No reserve keeps the outputs of layers, of which h_n of short rows is read last."""
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        expected = call(module, inputs)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert_equal(call(module, inputs), expected)


def test_no_block_of_a_diagonal_starts_early() -> None:
    """New memory is NaN: what a call before has left there would be the right numbers."""
    module = fastrnn.RNN(128, 128, 3).requires_grad_(False)
    x = torch.randn(600, 1, 128)
    expected = module(x)[0]
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(module(x)[0], expected) for _ in range(200))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("case", cases(T=[11], N=[1, 7], H=[70], L=[2], D=[2]), ids=str)
def test_matches_torch(case: Case, threads: int) -> None:
    inputs = make_inputs(case)
    expected = run(build(nn, case), inputs)
    torch.set_num_threads(threads)
    assert_same(run(build(fastrnn, case), inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_flushed_in_all_threads_or_none(dtype: torch.dtype) -> None:
    """The setting is each thread's own, and those of the pool were there before it."""
    case = Case("LSTM", T=5, N=6, I=300, H=300, bias=False, dtype=dtype)
    assert flops(case) >= 3 * FLOPS_PER_THREAD
    module = build(fastrnn, case).requires_grad_(False)
    inputs = Inputs(make_inputs(case).x * (30 * torch.finfo(dtype).tiny))
    torch.set_num_threads(3)
    kept = call(module, inputs)
    try:
        assert torch.set_flush_denormal(True)
        flushed = call(module, inputs)
        torch.set_num_threads(1)
        assert_equal(call(module, inputs), flushed)
    finally:
        torch.set_flush_denormal(False)
    assert_equal(call(module, inputs), kept)
    assert not torch.equal(kept["y"], flushed["y"])


REPEATED = cases(T=[20], N=[1, 7], I=[101], H=[300], dtype=FUSED_DTYPES)


@pytest.mark.parametrize("case", [replace(case, D=2) for case in REPEATED], ids=str)
def test_again_and_again(case: Case) -> None:
    assert flops(case) >= 3 * FLOPS_PER_THREAD
    module, inputs = build(fastrnn, case), make_inputs(case)
    first = run(module, inputs)
    torch.set_num_threads(3)
    for _ in range(5):
        assert_equal(run(module, inputs), first)


@pytest.mark.parametrize("case", cases(T=[1], N=[1, 7], I=[1101], H=[515], hx=[True]), ids=str)
def test_gradient_of_the_state_of_a_single_step(case: Case) -> None:
    """It follows from what all threads leave, after a step that needs no barrier by itself."""
    assert 2 * flops(case) >= FLOPS_PER_THREAD  # of the backward pass
    module, inputs = build(fastrnn, case), make_inputs(case)
    first = run(module, inputs)
    torch.set_num_threads(3)
    for _ in range(100):
        assert_equal(run(module, inputs), first)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_calls_from_several_python_threads(case: Case) -> None:
    assert flops(case) >= 2 * FLOPS_PER_THREAD
    module, inputs = build(fastrnn, case), make_inputs(case)

    def infer(threads: int) -> dict:
        assert torch.get_num_threads() == threads
        with torch.no_grad():
            return call(module, inputs)

    expected = infer(1)
    torch.set_num_threads(2)
    with ThreadPoolExecutor(8) as pool:
        for outputs in pool.map(infer, [2] * 24):
            assert_equal(outputs, expected)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_training_in_several_python_threads(case: Case) -> None:
    inputs = make_inputs(case)
    modules = [build(fastrnn, case) for _ in range(8)]
    expected = run(build(fastrnn, case), inputs)
    torch.set_num_threads(2)
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda module: run(module, inputs), modules):
            assert_equal(results, expected)


WAITS = """
import os, resource, sys, torch, fastrnn

torch.set_num_threads(2)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.randn(1000, 1000) @ torch.randn(1000, 1000)  # torch's pool starts with the usual priority
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
except PermissionError:
    sys.exit(77)
lstm, x = fastrnn.LSTM(256, 256), torch.randn(50, 1, 256)
with torch.inference_mode():
    lstm(x)
print(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw)
"""


def test_a_caller_of_real_time_priority_lets_others_run() -> None:
    """It sleeps where it waits for a thread that its yielding would not let run."""
    process = run_python("-c", WAITS)
    if process.returncode == 77:
        pytest.skip("real-time priority is not allowed here")
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= 20  # of 50 steps, after each of which it waits
