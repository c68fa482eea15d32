"""Results are compared before anything is timed: a wrong answer has no speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest difference allowed, over the largest magnitude in the reference tensor. Two correct
# implementations differ by the order of their sums: some hundred roundings (float32 6e-8, float64
# 1e-16), or for the 16-bit types some ten roundings of the stored values (bf16 4e-3, f16 5e-4).
TOLERANCE: dict[torch.dtype, float] = {
    torch.float32: 3e-5,
    torch.float64: 1e-13,
    torch.bfloat16: 6e-2,
    torch.float16: 8e-3,
}


# Of float32, whose products may have the bits of two bfloat16, or of one.
TOLERANCE_BY_PRECISION: dict[str, float] = {
    "highest": TOLERANCE[torch.float32],
    "high": 2e-3,
    "medium": TOLERANCE[torch.bfloat16],
}


def tolerance(reference: Tensor) -> float:
    """Largest difference allowed from a tensor."""
    if reference.is_cuda and reference.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return TOLERANCE[torch.float16]  # TF32 keeps as many bits in its products
    if reference.dtype == torch.float32:
        return TOLERANCE_BY_PRECISION[torch.get_float32_matmul_precision()]
    return TOLERANCE[reference.dtype]


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where a NaN is."""
    actual, expected = actual.double(), expected.double()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    worst = float((actual - expected).abs().max() / scale)
    return math.inf if math.isnan(worst) else worst


def mismatches(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What differs beyond the tolerance of its dtype, one line each; empty if all agrees."""
    found = []
    for name, reference in expected.items():
        if name not in actual:
            found.append(f"{name} is missing")
        elif actual[name].shape != reference.shape:
            shapes = f"{tuple(actual[name].shape)}, not {tuple(reference.shape)}"
            found.append(f"{name} has shape {shapes}")
        elif (error := difference(actual[name], reference)) > tolerance(reference):
            found.append(f"{name} differs by {error:.1e} of its largest value")
    return found
