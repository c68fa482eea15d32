"""Outputs, states and gradients of fastrnn's modules are torch.nn's."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from helpers import (
    DTYPES,
    KINDS,
    LEAST_SCALE,
    Case,
    assert_same,
    build,
    call,
    cases,
    make_inputs,
    run,
    takes_fused_path,
)

FEATURES = [
    *cases(L=[1, 2], D=[1, 2], hx=[False, True], dtype=DTYPES),
    *cases(P=[3], L=[1, 2], D=[1, 2], hx=[False, True], dtype=DTYPES),
    *cases(L=[2], D=[2], bias=[False], P=[0, 3], dtype=DTYPES),
    *cases(L=[2], D=[2], batch_first=[True], hx=[True], P=[0, 3], dtype=DTYPES),
    *cases(N=[None], L=[2], D=[2], batch_first=[False, True], hx=[False, True], dtype=DTYPES),
    *cases(L=[3], P=[0, 16], hx=[True]),
]

SIZES = [
    *cases(T=[1, 2, 33], N=[1, 2, 17], I=[1, 7], H=[1, 16, 33]),
    *cases(["LSTM"], T=[1, 9], N=[1, 5], I=[130], H=[64, 130], dtype=DTYPES),
    *cases(["LSTM"], T=[5], N=[1, 6, 33], H=[17, 33], P=[1, 16], dtype=DTYPES),
    *cases(T=[3], N=[65], I=[3], H=[15, 48], dtype=DTYPES),
    *cases(T=[100], N=[1], I=[8], H=[32], D=[1, 2], dtype=DTYPES),
]

# The upper layers are narrower than the first, which fills the kernels' panels and spans, and need
# working memory that it does not.
NARROWER = [
    *cases(T=[8], N=[1, 2], I=[256, 512], H=[96, 300], L=[2, 3], dtype=DTYPES),
    *cases(T=[4], N=[1, 9], I=[128, 256], H=[56, 100], L=[2], D=[2]),
    *cases(["LSTM"], T=[4], N=[1, 9], I=[128], H=[128], P=[56], L=[2], D=[2], dtype=DTYPES),
]


def check(
    case: Case, scale: float = 1.0, factor: float = 1.0, least_scale: float = LEAST_SCALE
) -> None:
    """Asserts that both libraries give the same results on `case`."""
    inputs = make_inputs(case, scale=scale)
    ours, theirs = (run(build(package, case), inputs) for package in (fastrnn, nn))
    assert_same(ours, theirs, factor, least_scale)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case: Case) -> None:
    # A gradient of one element may be no more than what its terms leave of each other.
    check(case, least_scale=0.1 if case.H == 1 else LEAST_SCALE)


@pytest.mark.parametrize("case", NARROWER, ids=str)
def test_narrower_upper_layers(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_inference(case: Case) -> None:
    inputs = make_inputs(case)
    expected = call(build(nn, case), inputs)
    ours = build(fastrnn, case)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs = call(ours, inputs)
        assert not any(output.requires_grad for output in outputs.values())
        assert_same(outputs, expected)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_fused_path_is_taken(case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    y = call(module, inputs)["y"]
    assert y.grad_fn is not None and "Recurrent" in y.grad_fn.name()
    with torch.no_grad():
        assert takes_fused_path(lambda: call(module, inputs))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {}),
        ("RNN", {"num_layers": 2}),
        ("RNN", {"num_layers": 2, "bidirectional": True}),
        ("LSTM", {"num_layers": 2}),
    ],
    ids=["RNN", "RNN-L2", "RNN-L2-D2", "LSTM-L2"],
)
def test_tutorial_calls(name: str, options: dict) -> None:
    modules = []
    for package in (fastrnn, nn):
        torch.manual_seed(0)
        modules.append(getattr(package, name)(5, 8, batch_first=True, **options))
    ours, theirs = modules
    x = torch.randn(1, 10, 5)
    layers, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)

    y, hidden = ours(x)
    states = hidden if name == "LSTM" else (hidden,)
    assert y.shape == (1, 10, 8 * directions)
    assert all(state.shape == (layers * directions, 1, 8) for state in states)

    y_nn, hidden_nn = theirs(x)
    torch.testing.assert_close(y, y_nn)
    torch.testing.assert_close(hidden, hidden_nn)


@pytest.mark.parametrize("case", cases(N=[0], L=[1, 2], D=[1, 2], hx=[False, True]), ids=str)
def test_empty_batch(case: Case) -> None:
    check(case)
    ours = run(build(fastrnn, case), make_inputs(case))
    assert ours["y"].shape == (case.T, 0, case.D * case.H)
    assert not ours["dweight_hh_l0"].any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed_dims": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "strided_last_dim": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "padded_rows": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], dim=-1)[
        ..., : t.size(-1)
    ],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases(hx=[True], L=[2], batch_first=[False, True]), ids=str)
def test_non_contiguous_input(case: Case, layout: str) -> None:
    ours = build(fastrnn, case)
    dense = make_inputs(case)
    laid_out = dense._replace(
        **{n: LAYOUTS[layout](t) for n, t in dense._asdict().items() if isinstance(t, Tensor)}
    )
    assert torch.equal(laid_out.x, dense.x)
    assert_same(call(ours, laid_out), call(build(nn, case), dense))

    leaf = dense.x.clone().requires_grad_()
    call(ours, laid_out._replace(x=LAYOUTS[layout](leaf)))["y"].sum().backward()
    leaf_nn = dense.x.clone().requires_grad_()
    call(build(nn, case), dense._replace(x=leaf_nn))["y"].sum().backward()
    assert_same({"dx": leaf.grad}, {"dx": leaf_nn.grad})


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_input(kind: str) -> None:
    case = Case(kind, hx=True, L=2)
    inputs = make_inputs(case)
    expanded = inputs._replace(
        x=inputs.x[:1, :1].expand(case.T, case.N, case.I),
        h0=inputs.h0[:, :1].expand(-1, case.N, -1),
    )
    dense = expanded._replace(x=expanded.x.contiguous(), h0=expanded.h0.contiguous())
    assert_same(call(build(fastrnn, case), expanded), call(build(nn, case), dense))


TARGETS = ["x", "h0", "weight_hh_l0", "bias_ih_l0"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
@pytest.mark.parametrize(
    ("kind", "target"), [*((k, t) for k in KINDS for t in TARGETS), ("LSTM", "c0")]
)
def test_non_finite_values(kind: str, target: str, value: float, dtype: torch.dtype) -> None:
    case = Case(kind, T=4, H=18, L=2, D=2, hx=True, dtype=dtype)
    inputs = make_inputs(case)
    modules = [build(package, case) for package in (fastrnn, nn)]
    with torch.no_grad():
        if hasattr(inputs, target):
            getattr(inputs, target)[1, 1, 2] = value
        else:
            for module in modules:
                getattr(module, target)[..., 3] = value
    ours, theirs = (run(module, inputs) for module in modules)
    for name, want in theirs.items():
        got = ours[name]
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isposinf(), want.isposinf()), name
        assert torch.equal(got.isneginf(), want.isneginf()), name
    assert_same(call(modules[0], inputs), call(modules[1], inputs))


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4], ids=lambda s: f"scale{s:g}")
@pytest.mark.parametrize(
    "case", cases(["LSTM", "RNN_TANH"], D=[2], hx=[True], dtype=DTYPES), ids=str
)
def test_scales_of_input(case: Case, scale: float) -> None:
    check(case, scale, factor=10)  # a gate's slope is as uncertain as its argument is large


@pytest.mark.parametrize("case", cases(T=[1000], N=[2], I=[3], H=[20], dtype=DTYPES), ids=str)
def test_long_sequence(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", cases(L=[2], P=[0, 3], hx=[True]), ids=str)
def test_zeros_are_the_default_state(case: Case) -> None:
    module = build(fastrnn, case)
    inputs = make_inputs(replace(case, hx=False))
    zeros = make_inputs(case, scale=0.0)
    given = call(module, inputs._replace(h0=zeros.h0, c0=zeros.c0))
    assert_same(call(module, inputs), given)
