"""Gradients of each sample's own: recurrent_backward with samples.

test_isa.py runs this file under each instruction set, cuda/test_modules.py its values on emulated
CUDA kernels.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map

import fastrnn  # noqa: F401  (registers the ops)
from helpers import FUSED_DTYPES, Case, assert_equal, assert_same, build, cases, make_inputs

ops = torch.ops.fastrnn
V = 3  # samples

CASES = [
    *cases(T=[19], N=[2], H=[9, 33], hx=[True], dtype=FUSED_DTYPES),
    *cases(["LSTM"], T=[5], N=[1], L=[2], D=[2], P=[0, 3], hx=[True], dtype=FUSED_DTYPES),
    *cases(["LSTM", "RNN_TANH"], T=[5], N=[3], L=[2], bias=[False], batch_first=[True]),
    *cases(T=[7], N=[4], L=[2], D=[2], P=[0, 3], lengths=[(7, 4, 4, 1)], hx=[True]),
    *cases(T=[1], N=[1], H=[40]),
]
# As many rows of a sample as take several chunks, blocks of rows, or sums of blocks.
MANY_ROWS = [
    *cases(T=[400], N=[2], H=[17], dtype=FUSED_DTYPES),
    *cases(["LSTM"], T=[300], N=[2], P=[3], D=[2], H=[17]),
    *cases(["LSTM"], T=[300], N=[3], lengths=[(300, 299, 290)], H=[17]),
    *cases(T=[2900], N=[3], I=[3], H=[5]),
    *cases(["LSTM"], T=[2900], N=[3], I=[3], H=[5], P=[2]),
]


@pytest.fixture(autouse=True)
def three_threads(threads_as_asked: None) -> Iterator[None]:
    """Calls take three threads where their work is worth it, on a machine with two cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def arguments_of(case: Case, seed: int) -> dict[str, Any]:
    """Returns the arguments of recurrent_backward for a sample of `case`, by name."""
    x, _, h0, c0 = make_inputs(case, seed)
    batch_sizes = None
    if case.lengths:
        packed = pack_padded_sequence(x, case.lengths, case.batch_first)
        x, batch_sizes = packed.data, packed.batch_sizes
    tensors = {"x": x, "batch_sizes": batch_sizes, "h0": h0, "c0": c0}
    return with_gradients(case, tensors, seed)


def with_gradients(case: Case, tensors: dict[str, Any], seed: int) -> dict[str, Any]:
    """Completes x, batch_sizes, h0 and c0 by gradients of the outputs."""
    weights = list(build(nn, case).requires_grad_(False).parameters())
    options = {
        "num_layers": case.L,
        "has_biases": case.bias,
        "bidirectional": case.D == 2,
        "batch_first": case.batch_first,
        "masks": None,
        "dropout": 0.0,
    }
    y, h_n, c_n, reserve = ops.recurrent_forward(case.kind, **tensors, weights=weights, **options)
    generator = torch.Generator().manual_seed(seed)
    dy, dh_n, dc_n = (
        torch.randn(output.shape, generator=generator).to(output.dtype) for output in (y, h_n, c_n)
    )
    return {
        "mode": case.kind,
        "dy": dy,
        "dh_n": dh_n,
        "dc_n": dc_n if case.kind == "LSTM" else None,
        **tensors,
        "weights": weights,
        "y": y,
        "reserve": reserve,
        **options,
        "needs": [tensors.get(name) is not None for name in ("x", "h0", "c0")]
        + [True] * len(weights),
    }


def axis_of(case: Case, name: str) -> int:
    """Returns the dimension of an argument's rows."""
    return 0 if name in ("x", "dy") and (case.lengths or case.batch_first) else 1


def join(case: Case, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the arguments of one batch: row n of sample v is row n * V + v."""
    first = samples[0]

    def joined(name: str) -> Tensor | None:
        if first[name] is None:
            return None
        axis = axis_of(case, name)
        return torch.stack([sample[name] for sample in samples], axis + 1).flatten(axis, axis + 1)

    batch_sizes = None if first["batch_sizes"] is None else first["batch_sizes"] * len(samples)
    tensors = {name: joined(name) for name in ("x", "h0", "c0")} | {"batch_sizes": batch_sizes}
    batch = with_gradients(case, tensors, seed=0)
    batch |= {name: joined(name) for name in ("dy", "dh_n", "dc_n")}
    return batch | {"samples": len(samples)}


def named(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Calls the op; returns its results by name."""
    names = ["x", "h0", "c0", *(f"weight {i}" for i in range(len(arguments["weights"])))]
    wanted = [name for name, need in zip(names, arguments["needs"], strict=True) if need]
    return dict(zip(wanted, ops.recurrent_backward(**arguments), strict=True))


def split(case: Case, results: dict[str, Tensor], v: int) -> dict[str, Tensor]:
    """Returns sample v's part of a batch's results."""
    return {
        name: result[v]
        if name.startswith("weight")
        else result.unflatten(axis_of(case, name), (-1, V)).select(axis_of(case, name) + 1, v)
        for name, result in results.items()
    }


@pytest.mark.parametrize("case", [*CASES, *MANY_ROWS], ids=str)
def test_each_sample_is_as_alone(case: Case) -> None:
    alone = [arguments_of(case, seed) for seed in range(V)]
    together = named(join(case, alone))
    for v, arguments in enumerate(alone):
        assert_equal(split(case, together, v), named(arguments))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    """To rounding, which is what a GPU gives."""
    alone = [arguments_of(case, seed) for seed in range(V)]
    together = named(join(case, alone))
    for v, arguments in enumerate(alone):
        assert_same(split(case, together, v), named(arguments), factor=4)


@pytest.mark.parametrize("need", range(8))
def test_some_gradients(need: int) -> None:
    """Each alone, of those of a projected LSTM."""
    case = Case(T=5, N=2, P=3, hx=True)
    arguments = join(case, [arguments_of(case, seed) for seed in range(V)])
    everything = list(named(arguments).values())
    needs = [i == need for i in range(8)]
    (result,) = ops.recurrent_backward(**(arguments | {"needs": needs}))
    assert_equal({"": result}, {"": everything[need]})


@pytest.mark.parametrize(
    "case",
    [
        *cases(L=[2], D=[2], P=[0, 3], hx=[True], dtype=FUSED_DTYPES),
        *cases(L=[2], lengths=[(7, 4, 1)]),
    ],
    ids=str,
)
def test_samples_may_share_a_reserve(case: Case) -> None:
    one = arguments_of(case, seed=0)
    batch = join(case, [one] * V)
    assert batch["reserve"].numel() == V * one["reserve"].numel() > 0
    assert_equal(named(batch | {"reserve": one["reserve"]}), named(batch))


def test_some_samples_may_share_a_reserve() -> None:
    case = Case(L=2)
    two = join(case, [arguments_of(case, seed) for seed in range(2)])
    batch = join(case, [two] * 3) | {"samples": 6}
    assert_equal(named(batch | {"reserve": two["reserve"]}), named(batch))


def test_one_sample() -> None:
    arguments = arguments_of(Case(hx=True), seed=0)
    expected = {
        name: result[None] if name.startswith("weight") else result
        for name, result in named(arguments).items()
    }
    assert_equal(named(arguments | {"samples": 1}), expected)


@pytest.mark.parametrize("samples", [0, -1, 2, 4, 2**62])
@pytest.mark.parametrize("lengths", [None, (7, 4, 1)])
def test_samples_that_there_cannot_be(samples: int, lengths: tuple[int, ...] | None) -> None:
    arguments = arguments_of(Case(lengths=lengths), seed=0)
    with pytest.raises(RuntimeError, match="samples must divide the rows of each step"):
        ops.recurrent_backward(**arguments, samples=samples)


def test_packed_steps_of_other_rows() -> None:
    arguments = arguments_of(Case(lengths=(7, 4, 1)), seed=0)
    with pytest.raises(RuntimeError, match="samples must divide the rows of each step"):
        ops.recurrent_backward(**arguments, samples=3)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_reserve_of_another_size(count: int) -> None:
    case = Case(L=2)
    batch = join(case, [arguments_of(case, seed) for seed in range(V)])
    reserve = batch["reserve"].new_zeros(batch["reserve"].numel() // V * count + (count == 1))
    with pytest.raises(RuntimeError, match="reserve must have size"):
        ops.recurrent_backward(**(batch | {"reserve": reserve}))


@pytest.mark.parametrize("name", ["dy", "dh_n", "dc_n", "x", "h0", "c0", "weights", "y", "reserve"])
@pytest.mark.parametrize(
    "case",
    cases(["LSTM"], L=[2], P=[3], hx=[True], lengths=[None, (7, 4, 1)], dtype=[torch.float64]),
    ids=str,
)
def test_vmap_over_one_argument(case: Case, name: str) -> None:
    arguments = arguments_of(case, seed=0)
    each = [tree_map(lambda t, v=v: t * (v + 1), arguments[name]) for v in range(V)]

    def gradients(value: Any) -> list[Tensor]:
        return ops.recurrent_backward(**(arguments | {name: value}))

    found = torch.vmap(gradients)(tree_map(lambda *ts: torch.stack(ts), *each))
    expected = [torch.stack(column) for column in zip(*map(gradients, each), strict=True)]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "case",
    [*cases(["LSTM"], T=[3], L=[2], P=[3], hx=[True]), *cases(T=[3], lengths=[(3, 2, 1)])],
    ids=str,
)
def test_opcheck(case: Case) -> None:
    batch = join(case, [arguments_of(case, seed) for seed in range(V)])
    torch.library.opcheck(ops.recurrent_backward.default, (), batch)
