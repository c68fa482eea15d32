"""What is not fused is torch.nn's own computation, with its very result."""

import pytest
import torch
from torch import nn

import fastrnn
from helpers import (
    Case,
    assert_equal,
    build,
    call,
    cases,
    make_inputs,
    run,
    takes_fused_path,
)

LENGTHS = (2, 7, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True], lengths=[None, LENGTHS]), ids=str)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case)
    inputs = inputs._replace(**{n: getattr(inputs, n).to(dtype) for n in ("x", "h0")})
    if inputs.c0 is not None:
        inputs = inputs._replace(c0=inputs.c0.to(dtype))
    ours, theirs = (build(package, case).to(dtype) for package in (fastrnn, nn))
    results = run(ours, inputs)
    assert results["y"].dtype == dtype
    assert_equal(results, run(theirs, inputs))
    assert not takes_fused_path(lambda: call(ours, inputs))


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], batch_first=[False, True]), ids=str)
def test_meta_device(case: Case) -> None:
    x = make_inputs(case).x.to("meta")
    ours, theirs = (build(package, case).to("meta") for package in (fastrnn, nn))
    (y, hidden), (y_nn, hidden_nn) = ours(x), theirs(x)
    assert y.device.type == "meta" and y.shape == y_nn.shape
    states, states_nn = (h if case.kind == "LSTM" else (h,) for h in (hidden, hidden_nn))
    assert [state.shape for state in states] == [state.shape for state in states_nn]
