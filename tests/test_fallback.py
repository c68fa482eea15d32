"""What is not fused is torch.nn's own computation, with its very result."""

import pytest
from torch import nn

import fastrnn
from helpers import Case, build, cases, make_inputs


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], batch_first=[False, True]), ids=str)
def test_meta_device(case: Case) -> None:
    x = make_inputs(case).x.to("meta")
    ours, theirs = (build(package, case).to("meta") for package in (fastrnn, nn))
    (y, hidden), (y_nn, hidden_nn) = ours(x), theirs(x)
    assert y.device.type == "meta" and y.shape == y_nn.shape
    states, states_nn = (h if case.kind == "LSTM" else (h,) for h in (hidden, hidden_nn))
    assert [state.shape for state in states] == [state.shape for state in states_nn]
