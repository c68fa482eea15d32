"""Results and gradients do not depend on the number of threads, bit for bit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fastrnn
from helpers import DTYPES, Case, assert_equal, assert_same, build, call, cases, make_inputs, run

CASES = [
    *cases(T=[9], N=[1, 2, 13], I=[7], H=[33, 130], hx=[True], dtype=DTYPES),
    *cases(T=[5], N=[33], I=[33], H=[64], L=[2], D=[2], P=[0, 17]),
    *cases(T=[9], N=[5], H=[33], D=[2], lengths=[(3, 9, 1, 9, 2)], P=[0, 5], dtype=DTYPES),
    *cases(T=[200], N=[1], I=[3], H=[64]),
    *cases(T=[2], N=[1], I=[64], H=[300], D=[2]),
    *cases(N=[None], H=[48], L=[3]),
    *cases(N=[0], H=[48]),
    *cases(L=[2], N=[6], dropout=[0.5]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_thread_counts(case: Case) -> None:
    inputs = make_inputs(case)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(build(fastrnn, case), inputs))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("case", cases(T=[11], N=[1, 7], H=[70], L=[2], D=[2]), ids=str)
def test_matches_torch(case: Case, threads: int) -> None:
    inputs = make_inputs(case)
    expected = run(build(nn, case), inputs)
    torch.set_num_threads(threads)
    assert_same(run(build(fastrnn, case), inputs), expected)


@pytest.mark.parametrize("case", cases(T=[30], N=[1, 6], H=[64], D=[2]), ids=str)
def test_again_and_again(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    torch.set_num_threads(3)
    first = run(module, inputs)
    for _ in range(20):
        assert_equal(run(module, inputs), first)


@pytest.mark.parametrize("case", cases(T=[30], N=[1, 6], H=[64], dtype=DTYPES), ids=str)
def test_calls_from_several_python_threads(case: Case) -> None:
    torch.set_num_threads(2)
    module, inputs = build(fastrnn, case), make_inputs(case)

    def infer(_: int) -> dict:
        with torch.no_grad():
            return call(module, inputs)

    expected = infer(0)
    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(infer, range(40)):
            assert_equal(outputs, expected)


@pytest.mark.parametrize("case", cases(T=[30], N=[1, 6], H=[64]), ids=str)
def test_training_in_several_python_threads(case: Case) -> None:
    torch.set_num_threads(2)
    inputs = make_inputs(case)
    modules = [build(fastrnn, case) for _ in range(4)]
    expected = run(build(fastrnn, case), inputs)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda module: run(module, inputs), modules):
            assert_equal(results, expected)
