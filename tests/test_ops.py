"""The ops, called directly with what they accept, and torch.library.opcheck."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map_only

import fastrnn  # noqa: F401  (registers the ops)
from helpers import (
    DTYPES,
    Case,
    Recorder,
    assert_equal,
    assert_same,
    build,
    call,
    cases,
    draw_masks,
    make_inputs,
)

ops = torch.ops.fastrnn


def op_arguments(case: Case, requires_grad: bool = False) -> dict[str, Any]:
    """Returns the arguments of `recurrent` for `case`, by name."""
    module, inputs = build(nn, case), make_inputs(case)
    x, batch_sizes, h0, c0 = inputs.x, None, inputs.h0, inputs.c0
    if case.lengths:
        packed = pack_padded_sequence(x, case.lengths, case.batch_first)
        x, batch_sizes = packed.data, packed.batch_sizes
    tensors = [t for t in (x, h0, c0) if t is not None]
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)
    return {
        "mode": case.kind,
        "x": x,
        "batch_sizes": batch_sizes,
        "h0": h0,
        "c0": c0,
        "weights": list(module.requires_grad_(requires_grad).parameters()),
        "num_layers": case.L,
        "has_biases": case.bias,
        "bidirectional": case.D == 2,
        "batch_first": case.batch_first,
        "masks": draw_masks(case, x),
        "dropout": case.dropout,
    }


SAMPLES = [
    *cases(hx=[False, True]),
    *cases(L=[2], D=[2], P=[0, 3], hx=[True], dtype=DTYPES),
    *cases(L=[2], bias=[False], batch_first=[True]),
    *cases(N=[None], hx=[False, True], batch_first=[False, True]),
    *cases(D=[2], P=[0, 3], lengths=[(7, 4, 1)], hx=[True]),
    *cases(N=[0], L=[2]),
]


@pytest.mark.parametrize("case", [*SAMPLES, *cases(D=[2], lengths=[(7, 4, 1)])], ids=str)
def test_recurrent(case: Case) -> None:
    y, h_n, c_n = ops.recurrent(*op_arguments(case).values())
    results = {"y": y, "h_n": h_n}
    if case.kind == "LSTM":
        results["c_n"] = c_n
    else:
        assert c_n.numel() == 0
    assert_same(results, call(build(nn, case).requires_grad_(False), make_inputs(case)))


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_recurrent_forward(case: Case) -> None:
    arguments = op_arguments(case).values()
    *outputs, reserve = ops.recurrent_forward(*arguments)
    assert isinstance(reserve, Tensor)
    # Activations, cell states and outputs before a projection; outputs below the last layer, not y.
    per_strand = (case.kind == "LSTM") * 5 * case.H + (case.P > 0) * case.H
    below = (case.L - 1) * case.D * (case.P or case.H)
    rows = outputs[0].numel() // outputs[0].size(-1)
    assert reserve.numel() == rows * (case.L * case.D * per_strand + below)
    assert_equal(dict(enumerate(outputs)), dict(enumerate(ops.recurrent(*arguments))))


def test_keyword_arguments() -> None:
    arguments = op_arguments(Case(hx=True))
    by_name = ops.recurrent(**arguments)
    assert_equal(dict(enumerate(by_name)), dict(enumerate(ops.recurrent(*arguments.values()))))


@pytest.mark.parametrize("missing", ["h0", "c0"])
def test_each_state_may_be_left_out(missing: str) -> None:
    arguments = op_arguments(Case(hx=True, L=2))
    zeros = arguments | {missing: torch.zeros_like(arguments[missing])}
    without = ops.recurrent(**(arguments | {missing: None}))
    assert_equal(dict(enumerate(without)), dict(enumerate(ops.recurrent(**zeros))))


@pytest.mark.parametrize("case", cases(L=[2], D=[2], P=[0, 3], hx=[True], dtype=DTYPES), ids=str)
def test_strides(case: Case) -> None:
    def strided(value: Any) -> Any:
        if isinstance(value, list):
            return [strided(weight) for weight in value]
        if not isinstance(value, Tensor):
            return value
        return value.repeat_interleave(2, dim=-1)[..., ::2]

    arguments = op_arguments(case)
    results = ops.recurrent(*map(strided, arguments.values()))
    assert_same(dict(enumerate(results)), dict(enumerate(ops.recurrent(*arguments.values()))))


@pytest.mark.parametrize("case", cases(L=[3], dropout=[0.5, 1.0]), ids=str)
def test_dropout(case: Case) -> None:
    arguments = op_arguments(case)
    torch.manual_seed(0)
    arguments["masks"] = draw_masks(case, arguments["x"])
    y, h_n, _ = ops.recurrent(**arguments)
    module = build(nn, case)
    torch.manual_seed(0)
    expected = call(module, make_inputs(case))
    assert_same({"y": y, "h_n": h_n}, {name: expected[name] for name in ("y", "h_n")})


def test_strided_batch_sizes() -> None:
    arguments = op_arguments(Case(lengths=(7, 4, 1)))
    sizes = arguments["batch_sizes"]
    strided = torch.stack([sizes, sizes - 1], dim=1)[:, 0]
    results = ops.recurrent(**(arguments | {"batch_sizes": strided}))
    assert_equal(dict(enumerate(results)), dict(enumerate(ops.recurrent(**arguments))))


def test_cpu_capability() -> None:
    assert ops.cpu_capability() in ("AVX512", "AVX2", "DEFAULT")


OPCHECKED = [
    replace(case, T=3, N=case.N and 2, H=9)
    for case in [
        *cases(hx=[True]),
        *cases(["LSTM"], L=[2], D=[2], P=[3], bias=[False], batch_first=[True]),
        *cases(["LSTM"], D=[2], P=[0, 3], lengths=[(3, 2)], hx=[True], dtype=[torch.float64]),
        *cases(["RNN_RELU"], L=[2], lengths=[(3, 2)], hx=[True]),
        *cases(["RNN_TANH"], N=[None, 0], L=[2]),
    ]
]


@pytest.mark.parametrize("name", ["recurrent_backward", "output_again"])
def test_no_cuda_graph_keeps_sizes_that_are_read_on_the_host(name: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fastrnn, name).default.tags


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_recurrent(case: Case, requires_grad: bool) -> None:
    torch.library.opcheck(ops.recurrent.default, tuple(op_arguments(case, requires_grad).values()))


@pytest.mark.parametrize("op", ["recurrent_forward", "recurrent_backward"])
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_of_what_autograd_calls(case: Case, op: str) -> None:
    with Recorder(f"fastrnn::{op}") as recorder:
        y, *_ = ops.recurrent(**op_arguments(case, requires_grad=True))
        y.sum().backward()
    assert len(recorder.calls) == 1
    args, kwargs = recorder.calls[0]
    if case.lengths:  # sizes are data, which gradients of gradients read and no trace has
        args = tree_map_only(Tensor, Tensor.detach, args)
    torch.library.opcheck(getattr(ops, op).default, args, kwargs)


@pytest.mark.parametrize("has_biases", [True, False])
def test_projection_as_wide_as_hidden(has_biases: bool) -> None:
    """torch.nn's modules have none; what the op keeps shows that it is one."""
    H, layers = 4, 2
    shapes = [(4 * H, H), (4 * H, H), *[(4 * H,)] * (2 * has_biases), (H, H)]
    weights = [torch.randn(shape) for shape in shapes * layers]
    arguments = ("LSTM", torch.randn(5, 3, H), None, None, None, weights, layers)
    arguments = (*arguments, has_biases, False, False, None)
    reserve = ops.recurrent_forward(*arguments)[-1]
    assert reserve.numel() == 5 * 3 * (layers * (5 + 1) * H + (layers - 1) * H)
    torch.library.opcheck(ops.recurrent_forward.default, arguments)
    with torch.autocast("cpu", torch.float16):
        y, h_n, c_n = ops.recurrent(*arguments)
    assert (y.dtype, h_n.dtype, c_n.dtype) == (torch.float16, torch.float16, torch.float32)


@pytest.mark.parametrize(
    "case",
    [*OPCHECKED, *cases(["LSTM"], L=[2], D=[2], batch_first=[True], dropout=[0.5], hx=[True])],
    ids=str,
)
def test_opcheck_output_again(case: Case) -> None:
    arguments = list(op_arguments(case).values())
    y, *_, reserve = ops.recurrent_forward(*arguments)
    again = (*arguments[:6], reserve, *arguments[6:])
    assert_equal({"y": ops.output_again(*again)}, {"y": y})
    strided = reserve.repeat_interleave(2)[::2]
    assert_equal({"y": ops.output_again(*again[:6], strided, *again[7:])}, {"y": y})
    torch.library.opcheck(ops.output_again.default, again)
