"""Results are as near the truth as torch.nn's own: at most twice its error.

The truth of a float32, bfloat16 or float16 run is torch.nn's float64 result, that of a float64 run
is computed here in numpy's extended precision.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrnn
from helpers import (
    HALF_DTYPES,
    KINDS,
    MANY_ROWS,
    Case,
    Inputs,
    build,
    call,
    cases,
    make_inputs,
    run,
    takes_fused_path,
    to_double,
)

CASES = [
    *cases(T=[20], N=[8], I=[33], H=[64], L=[1, 2], D=[1, 2], hx=[True]),
    *cases(["LSTM"], T=[20], N=[8], I=[33], H=[64], P=[17], L=[1, 2], D=[1, 2], hx=[True]),
    *cases(T=[20], N=[8], I=[33], H=[64], lengths=[(20, 3, 1, 20, 17, 8, 8, 2)], D=[2]),
    *cases(T=[5], N=[4], I=[17], H=[300]),
    *cases(T=[100], N=[1], I=[17], H=[130]),
    *cases(T=[2], N=[130], I=[300], H=[33]),
    *cases(T=[1000], N=[4], I=[7], H=[17]),
]
LONG = cases(T=[10_000], N=[2], I=[7], H=[33])
MANY = [
    *(case for case in MANY_ROWS if case.dtype == torch.float32),
    *cases(["RNN_TANH"], T=[100], N=[4096], I=[7], H=[8]),
]

# Where an activation function is hard to get right: the scale of x, and what is added to the
# biases of the gates i, f, g, o. Biases are dropped where x is small, so that it stays so.
REGIMES = {
    "small": (1e-6, None),
    "saturating": (30.0, (0, 0, 0, 0)),
    "huge": (1e4, (0, 0, 0, 0)),
    "closed_i": (1.0, (-80, 0, 0, 0)),
    "closed_o": (1.0, (0, 0, 0, -80)),
    "open": (1.0, (80, 80, 0, 80)),
}


def assert_error_is_small(
    name: str, error: Tensor, error_nn: Tensor, exact: Tensor, eps: float
) -> None:
    """Asserts that `error` is at most twice `error_nn`, on average and at worst.

    The floors are what storing a result costs: one rounding on average, two at worst.
    """
    for norm, floor in ((2, eps), (float("inf"), 2 * eps)):
        size, size_nn, size_exact = (
            torch.linalg.vector_norm(t, norm).item() for t in (error, error_nn, exact)
        )
        assert size <= 2 * size_nn + floor * size_exact, (
            f"{name}: error {size:.2e} in norm {norm}, torch.nn's is {size_nn:.2e}, "
            f"of {size_exact:.2e}"
        )


def check(ours: nn.RNNBase, theirs: nn.RNNBase, inputs: Inputs, case: Case) -> None:
    """Compares runs of both libraries with torch.nn's float64 run."""
    exact_inputs = Inputs(*(v.double() if isinstance(v, Tensor) else v for v in inputs))
    truth = run(to_double(theirs, case), exact_inputs)
    results, results_nn = run(ours, inputs), run(theirs, inputs)
    assert results.keys() == truth.keys()
    for name, exact in truth.items():
        errors = (t[name].double() - exact for t in (results, results_nn))
        assert_error_is_small(name, *errors, exact, torch.finfo(case.dtype).eps)


def same_units_are_off(modules: list[nn.RNNBase], inputs: Inputs, case: Case) -> bool:
    """Returns whether the modules' outputs are 0 where those in float64 are."""
    exact_inputs = Inputs(*(v.double() if isinstance(v, Tensor) else v for v in inputs))
    truth = call(to_double(modules[-1], case), exact_inputs)["y"]
    return all(torch.equal(call(module, inputs)["y"] == 0, truth == 0) for module in modules)


@pytest.mark.parametrize("case", [*CASES, *LONG, *MANY], ids=str)
def test_float32(case: Case) -> None:
    check(build(fastrnn, case), build(nn, case), make_inputs(case), case)


@pytest.mark.parametrize(
    "case", [replace(case, dtype=dtype) for dtype in HALF_DTYPES for case in CASES], ids=str
)
def test_half_precision(case: Case) -> None:
    ours, theirs = build(fastrnn, case), build(nn, case)
    inputs = make_inputs(case)
    if case.kind == "RNN_RELU":
        # A relu whose input is within rounding of 0 has a gradient or none, as it happens. Few of
        # these are a large error: inputs with none. Of many, both libraries have as many.
        draws = (make_inputs(case, seed) for seed in range(1, 20))
        clear = (some for some in draws if same_units_are_off([ours, theirs], some, case))
        inputs = next(clear, inputs)
    check(ours, theirs, inputs, case)
    assert takes_fused_path(lambda: call(ours, inputs))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_in_regime(kind: str, regime: str) -> None:
    scale, gate_biases = REGIMES[regime]
    case = Case(kind, T=12, N=6, I=17, H=33, bias=gate_biases is not None)
    ours, theirs = build(fastrnn, case), build(nn, case)
    if kind == "LSTM" and gate_biases is not None:
        shift = torch.tensor(gate_biases, dtype=torch.float32).repeat_interleave(case.H)
        for module in (ours, theirs):
            module.bias_ih_l0.data.add_(shift)
    check(ours, theirs, make_inputs(case, scale=scale), case)


@pytest.mark.parametrize("kind", ["LSTM", "RNN_TANH"])
def test_float32_does_not_drift(kind: str) -> None:
    """10,000 steps with memories that hardly fade, so that the rounding of every step stays.

    Units remember for e^2 to e^12 steps in an LSTM, where a forget gate near 1 that is rounded to
    one side shows, and in an RNN for as long as the sequence is. Each unit's error is taken as a
    share of its size, so that each counts.
    """
    case = Case(kind, T=10_000, N=8, I=7, H=33)
    ours, theirs = (build(package, case).requires_grad_(False) for package in (fastrnn, nn))
    if kind == "LSTM":
        ours.bias_ih_l0[case.H : 2 * case.H] += torch.linspace(2, 12, case.H)
        ours.weight_hh_l0 /= 4  # a loop through other units could blow one rounding up
    else:
        nn.init.orthogonal_(ours.weight_hh_l0)
    theirs.load_state_dict(ours.state_dict())
    inputs = make_inputs(case, scale=0.1)
    truth = call(to_double(theirs, case), Inputs(inputs.x.double()))
    results, results_nn = call(ours, inputs), call(theirs, inputs)
    for name, exact in truth.items():
        sizes = exact.abs().amax(dim=(0, 1))
        error, error_nn = (
            ((t[name] - exact) / sizes).square().mean().sqrt().item() for t in (results, results_nn)
        )
        assert error <= 2 * error_nn, f"{name}: error {error:.2e}, torch.nn's is {error_nn:.2e}"


def extended_forward(module: nn.RNNBase, x: Tensor) -> dict[str, np.ndarray]:
    """Runs a one-layer module on x (T, N, I) in extended precision, step by step."""
    w_ih, w_hh, b_ih, b_hh = (p.detach().numpy().astype(np.longdouble) for p in module.parameters())
    h = c = np.zeros((x.size(1), module.hidden_size), dtype=np.longdouble)
    y = []
    for x_t in x.numpy().astype(np.longdouble):
        gates = x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh
        if module.mode == "LSTM":
            i, f, g, o = np.split(gates, 4, axis=1)
            i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
            c = f * c + i * np.tanh(g)
            h = o * np.tanh(c)
        else:
            h = np.tanh(gates) if module.mode == "RNN_TANH" else np.maximum(gates, 0)
        y.append(h)
    results = {"y": np.stack(y), "h_n": h[None]}
    return results | ({"c_n": c[None]} if module.mode == "LSTM" else {})


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= 2e-16, reason="no extended precision here")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0], ids=lambda s: f"scale{s:g}")
@pytest.mark.parametrize(
    "case", cases(T=[12], N=[6], I=[17], H=[33, 130], dtype=[torch.float64]), ids=str
)
def test_float64(case: Case, scale: float) -> None:
    ours, theirs = (build(package, case).requires_grad_(False) for package in (fastrnn, nn))
    inputs = make_inputs(case, scale=scale)
    results, results_nn = call(ours, inputs), call(theirs, inputs)
    truth = extended_forward(theirs, inputs.x)
    assert results.keys() == truth.keys()
    for name, exact in truth.items():
        # Subtract in extended precision; the difference then fits float64.
        errors = (
            torch.from_numpy((t[name].numpy() - exact).astype(np.float64))
            for t in (results, results_nn)
        )
        size = torch.from_numpy(exact.astype(np.float64))
        assert_error_is_small(name, *errors, size, torch.finfo(torch.float64).eps)
