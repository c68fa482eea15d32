"""Configurations drawn by hypothesis: results and gradients are torch.nn's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastrnn
from helpers import DTYPES, KINDS, Case, assert_same, build, call, make_inputs, run

pytestmark = pytest.mark.usefixtures("threads_as_asked")

SIZES = st.sampled_from([1, 2, 7, 8, 16, 17, 33])
UNITS = st.sampled_from([1, 2, 7, 16, 17, 33, 64, 130])


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Draws a Case of any kind and shape."""
    kind = draw(st.sampled_from(KINDS))
    units = draw(UNITS)
    case = {
        "kind": kind,
        "T": draw(SIZES),
        "N": draw(st.none() | st.just(0) | SIZES),
        "I": draw(UNITS),
        "H": units,
        "L": draw(st.integers(1, 3)),
        "D": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "hx": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    if kind == "LSTM" and units > 1 and draw(st.booleans()):
        case["P"] = draw(st.integers(1, units - 1))
    if case["L"] > 1 and draw(st.booleans()):
        case["dropout"] = draw(st.sampled_from([0.2, 0.5, 1.0]))
    if case["N"] and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, case["T"]), min_size=case["N"], max_size=case["N"]))
        case["lengths"] = tuple(sorted(lengths, reverse=True) if draw(st.booleans()) else lengths)
    return Case(**case)


THREADS = st.integers(1, 3)


@given(case=random_cases(), training=st.booleans(), seed=st.integers(0, 99), threads=THREADS)
def test_training_step(case: Case, training: bool, seed: int, threads: int) -> None:
    ours, theirs = (build(package, case, seed).train(training) for package in (fastrnn, nn))
    inputs = make_inputs(case, seed)
    torch.set_num_threads(1)
    expected = run(theirs, inputs, seed=seed)
    torch.set_num_threads(threads)
    assert_same(run(ours, inputs, seed=seed), expected)


@given(case=random_cases(), scale=st.sampled_from([1e-3, 1.0, 10.0]), threads=THREADS)
def test_inference(case: Case, scale: float, threads: int) -> None:
    ours, theirs = (build(package, case).eval() for package in (fastrnn, nn))
    inputs = make_inputs(case, scale=scale)
    with torch.inference_mode():
        torch.set_num_threads(1)
        expected = call(theirs, inputs)
        torch.set_num_threads(threads)
        assert_same(call(ours, inputs), expected, factor=max(1.0, scale))
