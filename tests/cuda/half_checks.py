"""16-bit modules of random shapes against float64 truth; run by test_modules.py.

Tolerances follow from the formats: h is rounded at each step and layer, dgates once more, and a
gradient of a weight is a sum over all rows of products of such numbers. relu is left out: which
side of its kink a value near 0 falls on is a matter of rounding (gate.cpp covers it).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastrnn
from helpers import HALF_DTYPES, Case, build, make_inputs, run, to_double
from test_random import random_cases

# Roundings that add up in one number: of h and dgates over some ten steps and three layers.
ROUNDINGS = 16


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@given(case=random_cases(), seed=st.integers(0, 99))
def test_training_step(dtype: torch.dtype, case: Case, seed: int) -> None:
    if case.kind == "RNN_RELU" or case.dropout > 0 or case.N == 0:
        case = replace(case, kind="RNN_TANH", dropout=0.0, N=case.N or 1, P=0)
    case = replace(case, dtype=dtype)
    module, inputs = build(fastrnn, case, seed), make_inputs(case, seed)
    truth = run(
        to_double(module, case),
        inputs._replace(
            **{
                name: value.double()
                for name, value in inputs._asdict().items()
                if isinstance(value, torch.Tensor)
            }
        ),
    )
    for name, got in run(module, inputs).items():
        want = truth[name]
        scale = max(1.0, want.abs().max().item())
        atol = ROUNDINGS * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol, msg=f"{case}: {name}")
