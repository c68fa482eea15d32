"""float32 whose products are computed from less, as torch's own setting allows.

Run where such kernels exist (build_info's matmul_precisions). Of test_isa.py's levels AVX512 alone
may have one, which its test_lower_precision_without_the_matrix_unit runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastrnn
import test_packed
import test_rows
import test_threads
from helpers import (
    Case,
    Inputs,
    assert_equal,
    build,
    call,
    cases,
    make_inputs,
    run,
    run_python,
    takes_fused_path,
    to_double,
)

# Relative errors of results and gradients, in the mean, of sums of two bfloat16 and of one.
ERRORS = {"high": (2**-19, 2**-14), "medium": (2**-11, 2**-6)}

CASES = [
    *cases(T=[20], N=[8], I=[33], H=[64], L=[2], D=[2], hx=[True]),
    *cases(["LSTM"], T=[20], N=[17], I=[33], H=[65], P=[17], hx=[True]),
    *cases(T=[7], N=[5], lengths=[(7, 3, 1, 7, 2)], I=[33], H=[64], D=[2]),
    *cases(T=[1], N=[1, 3, 40], I=[17], H=[300], hx=[True]),
    *cases(T=[50], N=[1], I=[17], H=[130]),
    *cases(T=[3], N=[130], I=[300], H=[33]),
]


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Sets torch's precision of float32 matrix products, and then the highest."""
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=["high", "medium"])
def lowered(request: pytest.FixtureRequest) -> Iterator[str]:
    """A lower precision, set while the test runs."""
    if request.param not in fastrnn.build_info()["matmul_precisions"]:
        pytest.skip("float32 itself is no slower on this processor")
    with precision(request.param):
        yield request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error(lowered: str, case: Case) -> None:
    """Results are as near the truth as the setting says, and no nearer: it was obeyed."""
    module, inputs = build(fastrnn, case), make_inputs(case)
    exact = Inputs(*(v.double() if isinstance(v, torch.Tensor) else v for v in inputs))
    truth, results = run(to_double(build(nn, case), case), exact), run(module, inputs)
    least, most = ERRORS[lowered]
    errors = {name: (results[name] - t).norm() / t.norm() for name, t in truth.items()}
    # A relu whose input is within the error of 0 has a gradient, or has not, as it happens.
    relu = case.kind == "RNN_RELU"
    judged = {k: e for k, e in errors.items() if not relu or k in ("y", "h_n")}
    assert max(judged.values()) < most, judged
    assert errors["y"] > least
    assert takes_fused_path(lambda: call(module, inputs))


def float32(of: list[Case]) -> list[Case]:
    return [case for case in of if case.dtype == torch.float32]


@pytest.mark.parametrize("case", float32(test_rows.BATCHES), ids=str)
@pytest.mark.parametrize("check", [test_rows.test_inference, test_rows.test_training])
def test_rows_are_themselves(lowered: str, check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", float32(test_packed.TOGETHER), ids=str)
def test_packed_is_each_sequence_alone(lowered: str, case: Case) -> None:
    test_packed.test_is_each_sequence_alone(case)


@pytest.mark.usefixtures("threads_as_asked")
@pytest.mark.parametrize("case", float32(test_threads.SEVERAL_THREADS), ids=str)
def test_threads_do_not_matter(lowered: str, case: Case) -> None:
    module, inputs = build(fastrnn, case), make_inputs(case)
    torch.manual_seed(0)
    one = run(module, inputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        assert_equal(run(module, inputs), one)


@pytest.mark.parametrize("kind", ["RNN_TANH", "RNN_RELU", "LSTM"])
def test_infinities_and_nan(lowered: str, kind: str) -> None:
    """They go where they go in float32, numbers of few bits and zeros among the factors."""
    case = Case(kind, T=3, N=5, I=17, H=33)
    module, inputs = build(fastrnn, case), make_inputs(case)
    with torch.no_grad():
        module.weight_ih_l0.copy_(module.weight_ih_l0.bfloat16())  # of which nothing is left over
        module.weight_ih_l0[5, 3] = 0
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan, 0.5)):
        inputs.x[1, row, 3] = value
    results = call(module, inputs)
    with precision("highest"):
        expected = call(module, inputs)
    most = 2 * ERRORS[lowered][1]  # of one result, where ERRORS are means
    for name, t in expected.items():
        torch.testing.assert_close(results[name], t, rtol=most, atol=most, equal_nan=True)
        assert torch.isfinite(t).any() and not torch.isfinite(t).all()


def test_largest_numbers_stay_finite(lowered: str) -> None:
    """Those past the largest bfloat16 too: infinity times 0 would be NaN."""
    case = Case("LSTM", T=3, N=5, I=17, H=33)
    module, inputs = build(fastrnn, case), make_inputs(case)
    largest = torch.finfo(torch.float32).max
    with torch.no_grad():
        module.weight_ih_l0[:, 3] = 0
    inputs.x[1, :4, 3] = torch.tensor([largest, -largest, 0.999 * largest, 3.3961775e38])
    results = call(module, inputs)
    with precision("highest"):
        expected = call(module, inputs)
    most = 2 * ERRORS[lowered][1]
    for name, t in expected.items():
        torch.testing.assert_close(results[name], t, rtol=most, atol=most)
        assert torch.isfinite(t).all()


def test_zeros_stay_zeros(lowered: str) -> None:
    case = Case("RNN_RELU", T=3, N=5, I=17, H=33, bias=False)
    module, inputs = build(fastrnn, case), make_inputs(case)
    results = run(module, Inputs(torch.zeros_like(inputs.x)))
    assert all(t.eq(0).all() for t in results.values())


def outputs(case: Case) -> dict[str, torch.Tensor]:
    return call(build(fastrnn, case), make_inputs(case))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_each_setting_is_read_at_each_call(lowered: str) -> None:
    case = Case("LSTM", T=5, N=4, I=33, H=64)
    low, setting = outputs(case), torch.backends.mkldnn.rnn
    with precision("highest"):
        highest = outputs(case)
        assert not same(low, highest)
        setting.fp32_precision = {"high": "tf32", "medium": "bf16"}[lowered]
        try:
            assert same(outputs(case), low)
        finally:
            setting.fp32_precision = "none"
        assert same(outputs(case), highest)
    torch.set_float32_matmul_precision(lowered)
    setting.fp32_precision = "ieee"
    try:
        assert same(outputs(case), highest)
    finally:
        setting.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types_are_as_they_are(lowered: str, dtype: torch.dtype) -> None:
    case = replace(Case("LSTM", T=5, N=4, I=33, H=64), dtype=dtype)
    low = outputs(case)
    with precision("highest"):
        assert same(outputs(case), low)


def test_compiled_code_obeys(lowered: str, fresh_compiler: None) -> None:
    case = Case("LSTM", T=5, N=4, I=33, H=64)
    module, inputs = build(fastrnn, case), make_inputs(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs.x)[0], module(inputs.x)[0])


def test_no_effect_without_such_kernels() -> None:
    code = """if True:
    import torch, fastrnn
    assert fastrnn.build_info()["matmul_precisions"] == ()
    lstm, x = fastrnn.LSTM(33, 64), torch.randn(5, 4, 33)
    expected = lstm(x)[0]
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(lstm(x)[0], expected)
    """
    result = run_python("-c", code, ATEN_CPU_CAPABILITY="avx2")
    assert result.returncode == 0, result.stderr


def test_only_named_settings_have_an_effect() -> None:
    case = Case("LSTM", T=5, N=4, I=33, H=64)
    highest = outputs(case)
    for name in ("high", "medium"):
        with precision(name):
            low = outputs(case)
        assert same(low, highest) == (name not in fastrnn.build_info()["matmul_precisions"])
