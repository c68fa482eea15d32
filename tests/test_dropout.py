"""Dropout between layers: the masks of torch.nn under the same seed."""

from typing import Any

import pytest
import torch
from torch import nn

import fastrnn
from helpers import (
    DTYPES,
    KINDS,
    Case,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    run,
)

LENGTHS = (2, 7, 4)

DROPPED = [
    *cases(L=[2, 3], D=[1, 2], dropout=[0.3], lengths=[None, LENGTHS], dtype=DTYPES),
    *cases(L=[3], D=[2], P=[3], dropout=[0.5], lengths=[None, LENGTHS], hx=[True]),
    *cases(L=[2], dropout=[0.5], batch_first=[True], lengths=[None, LENGTHS]),
    *cases(L=[2], dropout=[0.5], N=[None]),
    *cases(L=[2], dropout=[1.0], lengths=[None, LENGTHS], dtype=DTYPES),
    *cases(L=[2], dropout=[0.9999, 1e-4]),
    *cases(L=[2], dropout=[0.5], N=[0]),
]


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_training(case: Case) -> None:
    inputs = make_inputs(case)
    ours, theirs = build(fastrnn, case), build(nn, case)
    assert_same(run(ours, inputs), run(theirs, inputs))
    assert "Recurrent" in call(ours, inputs)["y"].grad_fn.name()


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_training_without_grad(case: Case) -> None:
    inputs = make_inputs(case)
    results = []
    for package in (fastrnn, nn):
        module = build(package, case)
        torch.manual_seed(5)
        with torch.no_grad():
            results.append(call(module, inputs))
    assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_generator_is_left_where_torch_leaves_it(kind: str, dropout: float) -> None:
    case = Case(kind, L=3, dropout=dropout)
    states = []
    for package in (fastrnn, nn):
        module = build(package, case)
        torch.manual_seed(5)
        call(module, make_inputs(case))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_drawn_anew_each_call(kind: str) -> None:
    case = Case(kind, L=2, dropout=0.5)
    module, inputs = build(fastrnn, case), make_inputs(case)
    first, second = call(module, inputs), call(module, inputs)
    assert not torch.equal(first["y"], second["y"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_raises_draws_nothing(kind: str) -> None:
    module = build(fastrnn, Case(kind, L=2, dropout=0.5))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        module(torch.zeros(7, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dropout", [-0.5, 1.5, float("nan"), None, "a"], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_what_is_no_probability_is_refused_in_torch_nn_words(kind: str, dropout: Any) -> None:
    errors = []
    for package in (fastrnn, nn):
        module = getattr(package, kind)(5, 8, num_layers=2, dropout=0.5)
        module.dropout = dropout
        with pytest.raises((RuntimeError, TypeError)) as raised:
            module(torch.zeros(7, 3, 5))
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("case", cases(L=[2], dropout=[0.5, 1.0], lengths=[None, LENGTHS]), ids=str)
def test_eval_drops_nothing(case: Case) -> None:
    inputs = make_inputs(case)
    dropped, kept = build(fastrnn, case).eval(), build(nn, case).eval()
    assert_same(run(dropped, inputs), run(kept, inputs))
    assert_equal(run(dropped, inputs, seed=2), run(dropped, inputs, seed=2))
    before = torch.get_rng_state()
    call(dropped, inputs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_has_nothing_to_drop(kind: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        module = build(fastrnn, Case(kind, dropout=0.5))
    inputs = make_inputs(Case(kind))
    assert_same(run(module, inputs), run(build(nn, Case(kind)), inputs))
