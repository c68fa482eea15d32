"""tanh and sigmoid, as the modules compute them: within 2 ulp of the truth, over every exponent.

tanh of doubles is within 2.4. test_isa.py runs this file under each instruction set.
"""

import numpy as np
import pytest
import torch

import fastrnn
from helpers import HALF_DTYPES

NUMPY_TYPES = {  # a format's values, its bits, and a wider format to know the truth in
    torch.float32: (np.float32, np.uint32, np.float64),
    torch.float64: (np.float64, np.uint64, np.longdouble),
}

# Where the kernels' formulas change: exp's argument is reduced by the nearest multiple of ln(2), of
# half of it for tanh; tanh has two branches that meet at 0.55; tanh beyond 10 or 20 and sigmoid
# beyond 104 or 746 keep their last value. From 9.02 or 19.1 on tanh rounds to 1.
BRANCHES = [0.55, 9.02, 10, 19.1, 20, 104, 746]
REDUCTIONS = {torch.float32: 700, torch.float64: 4400}  # quarters of ln(2) up to there

FUNCTIONS = {
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def module_computing(function: str, dtype: torch.dtype) -> fastrnn.RNN | fastrnn.LSTM:
    """Returns a module of one unit without biases, each weight 0 but that of x in `function`."""
    kind = fastrnn.RNN if function == "tanh" else fastrnn.LSTM
    module = kind(1, 1, bias=False, dtype=dtype).requires_grad_(False)
    for weight in module.parameters():
        weight.zero_()
    # RNN: y = tanh(x). LSTM, of the gates i, f, g, o: c_n = sigmoid(x) c0 + i tanh(0).
    module.weight_ih_l0[0 if function == "tanh" else 1] = 1
    return module


def computed(function: str, x: torch.Tensor) -> torch.Tensor:
    """Returns `function` of every x, as a batch of one step."""
    module = module_computing(function, x.dtype)
    if function == "tanh":
        return module(x.view(1, -1, 1))[0].flatten()

    def forget_gate(x: torch.Tensor) -> torch.Tensor:
        h0, c0 = torch.zeros(1, len(x), 1, dtype=x.dtype), torch.ones(1, len(x), 1, dtype=x.dtype)
        return module(x.view(1, -1, 1), (h0, c0))[1][1].flatten()

    c_n = forget_gate(x)
    # The weights of 0 would make NaN of an infinite x: it comes from the weight instead.
    module.weight_ih_l0[1] = torch.inf
    infinite = x.isinf()
    c_n[infinite] = forget_gate(x[infinite].sign())
    return c_n


def errors_in_ulp(y: np.ndarray, truth: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Returns |y - truth| in units of truth's last place in `dtype`; inf if just one is NaN."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(truth)  # |truth| is 2^exponent times [1/2, 1)
    _, lowest = np.frexp(np.longdouble(info.smallest_normal))
    ulp = np.ldexp(truth.dtype.type(info.eps) / 2, np.maximum(exponent, lowest))
    errors = np.where(y == truth, 0, abs(y - truth) / ulp)
    same_nan = np.isnan(y) & np.isnan(truth)
    return np.where(same_nan, 0, np.where(np.isnan(errors), np.inf, errors))


def check(function: str, x: torch.Tensor, truth_type: type, limit: float) -> None:
    """Asserts that `function` of every x is within `limit` ulp."""
    for part in x.split(1 << 20):
        with np.errstate(over="ignore", invalid="ignore"):
            wide = part.double().numpy().astype(truth_type)
            truth = FUNCTIONS[function](wide)
            y = computed(function, part).double().numpy().astype(truth_type)
            errors = errors_in_ulp(y, truth, x.dtype)
        worst = errors.argmax()
        assert errors[worst] <= limit, (
            f"{function}({wide[worst]!r}) is {y[worst]!r}, {errors[worst]:.2f} ulp off"
        )


def special_values(dtype: torch.dtype) -> np.ndarray:
    """Returns 0, the ends of the format's ranges, infinity, NaN and all that is near branches."""
    values, bits, _ = NUMPY_TYPES[dtype]
    info = np.finfo(values)
    ends = [0, info.smallest_subnormal, info.tiny, info.eps, 1, info.max, np.inf, np.nan]
    branches = [*BRANCHES, *(np.log(2) / 4 * np.arange(1, REDUCTIONS[dtype]))]
    near = np.array(branches, dtype=values).view(bits)[:, None] + np.arange(-300, 300).astype(bits)
    positive = np.concatenate([np.array(ends, dtype=values), near.ravel().view(values)])
    return np.concatenate([positive, -positive])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32(function: str) -> None:
    """Every 251st float, of both signs: denormals, normals, NaN."""
    every = np.arange(0, 1 << 32, 251, dtype=np.uint32).view(np.float32)
    x = np.concatenate([every, special_values(torch.float32)])
    check(function, torch.from_numpy(x), np.float64, 2)


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= 2e-16, reason="no extended precision here")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64(function: str) -> None:
    every = np.arange(0, 1 << 64, (1 << 46) - 21, dtype=np.uint64).view(np.float64)
    special = special_values(torch.float64)[::7]
    hardest = np.linspace(-0.35, -0.17, 1 << 19)  # of tanh: h is a small difference
    x = np.concatenate([every, special, hardest])
    check(function, torch.from_numpy(x), np.longdouble, 2.4 if function == "tanh" else 2)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision(function: str, dtype: torch.dtype) -> None:
    """Every value: half an ulp from storing the result, and a twentieth of one before."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    if dtype == torch.bfloat16:
        # The processor's own bfloat16 products (AVX-512 BF16) take denormals for 0.
        x = x[~(x.abs() < torch.finfo(dtype).smallest_normal)]
    check(function, x, np.float64, 0.55)
