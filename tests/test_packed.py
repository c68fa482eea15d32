"""Packed sequences: torch.nn's results, and those of each sequence alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from helpers import (
    DTYPES,
    FUSED_DTYPES,
    KINDS,
    Case,
    Inputs,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    random_weights,
    run,
    run_weighted,
    takes_fused_path,
)

LENGTHS = [
    (7, 7, 7),  # full
    (7, 4, 1),  # sorted
    (1, 7, 4),  # unsorted
    (2, 7, 2, 5, 7),
    (7,),
    (1, 1, 1, 1),
]

PACKED = [
    replace(case, lengths=lengths, T=max(lengths), N=len(lengths))
    for lengths in LENGTHS
    for case in [
        *cases(hx=[False, True], dtype=DTYPES),
        *cases(L=[2], D=[2], hx=[False, True], P=[0, 3]),
        *cases(["LSTM"], P=[3], hx=[True], dtype=DTYPES),
    ]
] + [
    *cases(T=[7], N=[3], lengths=[(3, 7, 1)], bias=[False], D=[2]),
    *cases(T=[7], N=[3], lengths=[(3, 7, 1)], batch_first=[True], hx=[True], D=[2]),
    *cases(T=[30], N=[33], I=[17], H=[33], lengths=[(*tuple(range(1, 31)), 30, 1, 8)], D=[2]),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_matches_torch(case: Case) -> None:
    inputs = make_inputs(case)
    ours = build(fastrnn, case)
    assert_same(run(ours, inputs), run(build(nn, case), inputs))
    assert "Recurrent" in call(ours, inputs)["y"].grad_fn.name()


TOGETHER = [
    replace(case, T=max(case.lengths), N=len(case.lengths))
    for case in [
        *cases(lengths=[(3, 7, 1, 7, 5)], L=[2], D=[2], hx=[True], P=[0, 3], dtype=FUSED_DTYPES),
        *cases(lengths=[(40, 3, 1, 9, 40, 26, 2)], H=[130], hx=[True], dtype=FUSED_DTYPES),
        *cases(lengths=[(1, 40, 33) * 10], H=[8], hx=[True], dtype=FUSED_DTYPES),
        # x is multiplied ahead for 128 rows at a time, for the sake of so many weights.
        *cases(["LSTM"], lengths=[(1, 23, 17) * 3], I=[70], H=[300], dtype=FUSED_DTYPES),
    ]
]


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_is_each_sequence_alone(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        weights = random_weights(call(module, inputs._replace(lengths=None)))
    together = run_weighted(module, inputs, weights)
    for b, length in enumerate(case.lengths):

        def cut(t: Tensor, name: str, b: int = b, length: int = length) -> Tensor:
            return t[:length, b : b + 1] if name in ("x", "y", "dx") else t[:, b : b + 1]

        alone = Inputs(
            **{name: cut(t, name) for name, t in inputs._asdict().items() if isinstance(t, Tensor)}
        )
        weights_alone = {name: cut(weight, name) for name, weight in weights.items()}
        in_batch = {name: cut(t, name) for name, t in together.items()}
        assert_equal(in_batch, run_weighted(module, alone, weights_alone))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_fused(kind: str) -> None:
    case = Case(kind, lengths=(2, 7, 4), L=2, D=2, hx=True)
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.inference_mode():
        assert takes_fused_path(lambda: call(module, inputs))
        assert_same(call(module, inputs), call(build(nn, case), inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_without_indices(kind: str) -> None:
    """A PackedSequence made by hand, or by enforce_sorted=True, has no sorting to undo."""
    case = Case(kind)
    ours, theirs = build(fastrnn, case), build(nn, case)
    x = PackedSequence(torch.randn(7, case.I), torch.tensor([3, 2, 1, 1]))
    (y, hidden), (y_nn, hidden_nn) = ours(x), theirs(x)
    assert y.sorted_indices is None and y.unsorted_indices is None
    torch.testing.assert_close(y.data, y_nn.data)
    torch.testing.assert_close(hidden, hidden_nn)


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_data(kind: str) -> None:
    case = Case(kind)
    ours, theirs = build(fastrnn, case), build(nn, case)
    data = torch.randn(case.I, 14).t()[::2]
    batch_sizes = torch.tensor([3, 3, 1])
    y, hidden = ours(PackedSequence(data, batch_sizes))
    y_nn, hidden_nn = theirs(PackedSequence(data.contiguous(), batch_sizes))
    torch.testing.assert_close(y.data, y_nn.data)
    torch.testing.assert_close(hidden, hidden_nn)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_read(kind: str) -> None:
    case = Case(kind, lengths=(2, 7, 4), D=2)
    inputs = make_inputs(case)
    for b, length in enumerate(case.lengths):
        inputs.x[length:, b] = torch.nan
    results = run(build(fastrnn, case), inputs)
    gradient = results.pop("dx")
    assert all(t.isfinite().all() for t in results.values())
    for b, length in enumerate(case.lengths):
        assert gradient[:length, b].all() and not gradient[length:, b].any()


@pytest.mark.parametrize("path", ["module", "op"])
@pytest.mark.parametrize("inference", [False, True])
def test_sizes_are_free_once_they_are_read(inference: bool, path: str) -> None:
    """As torch.nn's are, which reads them in the forward pass alone."""
    x, gradients = torch.randn(6, 5), []
    for package in (fastrnn, nn):
        module, of_x = build(package, Case("LSTM")), x.clone().requires_grad_()
        with torch.inference_mode(inference):
            sizes = torch.tensor([3, 2, 1])
        if package is fastrnn and path == "op":
            weights, options = list(module.parameters()), (1, True, False, False, None)
            y, *_ = torch.ops.fastrnn.recurrent_forward(
                "LSTM", of_x, sizes, None, None, weights, *options
            )
        else:
            y = module(PackedSequence(of_x, sizes))[0].data
        with torch.inference_mode(inference):
            sizes.fill_(2)
        gradients.append(torch.autograd.grad(y.square().sum(), [of_x, *module.parameters()]))
    torch.testing.assert_close(*gradients)
