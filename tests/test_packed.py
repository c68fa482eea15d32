"""Packed sequences: torch.nn's results, and those of each sequence alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fastrnn
from helpers import (
    DTYPES,
    KINDS,
    Case,
    Inputs,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    run,
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


@pytest.mark.parametrize("case", cases(L=[2], D=[2], hx=[True], P=[0, 3], dtype=DTYPES), ids=str)
def test_is_each_sequence_alone(case: Case) -> None:
    lengths = (3, 7, 1, 7, 5)
    case = replace(case, N=len(lengths), lengths=lengths)
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        together = call(module, inputs)
        packed = pack_sequence([inputs.x[:n, b] for b, n in enumerate(lengths)], False)
        y, _ = pad_packed_sequence(PackedSequence(together["y"], *packed[1:]))
        for b, length in enumerate(lengths):
            row = slice(b, b + 1)
            h0, c0 = (t if t is None else t[:, row] for t in (inputs.h0, inputs.c0))
            alone = call(module, Inputs(inputs.x[:length, row], None, h0, c0))
            in_batch = {name: state[:, row] for name, state in together.items() if name != "y"}
            assert_equal({"y": y[:length, row], **in_batch}, alone)


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
