"""What is not fused is torch.nn's own computation, with its very result."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

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


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_complex_numbers(name: str, trains: bool) -> None:
    ours, theirs = (getattr(p, name)(5, 8, dtype=torch.complex64) for p in (fastrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    x, results = torch.randn(4, 5, dtype=torch.complex64), []
    for module in (ours, theirs):
        y, *_ = torch.utils._pytree.tree_leaves(module(x))
        weights = list(module.parameters()) if trains else []
        results.append([y, *torch.autograd.grad(y.abs().sum(), weights)] if trains else [y])
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Disk(Exception):
    """Stands for what torch.nn knows nothing of."""


@pytest.mark.parametrize("kind", [ValueError, TypeError, IndexError, NotImplementedError, Disk])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "LSTMCell"])
def test_errors_of_hooks_are_no_refusals(name: str, kind: type[Exception]) -> None:
    """What the user's code raises during a call is raised by the call, which is not made again."""
    module, calls = getattr(fastrnn, name)(5, 8), []

    def pack(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        if len(calls) == 3:
            raise kind("disk full")
        return tensor

    x = torch.randn(3, 5) if name == "LSTMCell" else torch.randn(4, 3, 5)
    with saved_tensors_hooks(pack, lambda t: t), pytest.raises(kind, match="disk full"):
        module(x)
    assert len(calls) == 3
