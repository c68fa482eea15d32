"""Shapes that nobody chose, to look for one on which fastrnn loses."""

from __future__ import annotations

import math
import random

import torch

from fastrnn.bench.shapes import Shape
from grid import GRID

# What a call may cost: a training step of torch.nn then takes some tenths of a second.
_BUDGET = 8e9
# How much dearer than its operations a shape is: a narrower vector, or a matrix product that torch
# does slowly, or weights that come from memory for every row.
_DTYPE_FACTOR = {torch.float64: 2, torch.bfloat16: 4, torch.float16: 8}
_FEW_ROWS, _FEW_ROWS_FACTOR = 4, 4


def _size(rng: random.Random, low: int, high: int) -> int:
    """A size from low to high, as likely between 8 and 16 as between 512 and 1,024."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _units(rng: random.Random) -> int:
    """H from 8 to 1,024: a multiple of 16, of nothing, or one beside a multiple of 16."""
    units = _size(rng, 8, 1024)
    multiple = max(16, 16 * round(units / 16))
    return rng.choice([units, multiple, multiple - 1, min(1024, multiple + 1)])


def _draw_id(rng: random.Random) -> str:
    kind = rng.choice(["rnn", "rnn-relu", "rnn", "lstm", "lstm", "lstm"])
    rows = 1 if rng.random() < 0.2 else _size(rng, 1, 256)
    steps = 1 if rng.random() < 0.1 else _size(rng, 1, 200)
    units = _units(rng)
    inputs = units if rng.random() < 0.4 else _size(rng, 1, 1024)
    parts = [kind, f"B{rows}", f"T{steps}", f"I{inputs}", f"H{units}"]
    layers = rng.choice([1, 1, 1, 2, 3])
    parts += [f"L{layers}"] * (layers > 1)
    parts += ["bi"] * (rng.random() < 0.25)
    if kind == "lstm" and rng.random() < 0.15:
        parts.append(f"proj{rng.randint(1, units - 1)}")
    if rows > 1 and steps > 1 and rng.random() < 0.15:
        parts.append(f"packed{rng.randint(55, 95)}")
    parts += ["batchfirst"] * (rng.random() < 0.15) + ["hx"] * (rng.random() < 0.3)
    if rng.random() < 0.25:
        # No 16-bit relu: values that round to either side of 0 turn a gradient on or off, and two
        # right results differ by more than fastrnn.bench.check allows.
        parts.append(rng.choice(["f64"] if kind == "rnn-relu" else ["f64", "bf16", "f16"]))
    return "-".join(parts)


def _cost(shape: Shape) -> float:
    cost = shape.flops("training") * _DTYPE_FACTOR.get(shape.dtype, 1)
    return cost * (_FEW_ROWS_FACTOR if shape.N < _FEW_ROWS else 1)


def draw_shapes(count: int, seed: int) -> list[Shape]:
    """Draws count different shapes that are not in the grid, the same ones for the same seed.

    Batch 1 to 256, steps 1 to 200, hidden size 8 to 1,024, input size 1 to 1,024; with layers,
    directions, projections, packed input, initial states and dtypes as they come.
    """
    rng = random.Random(seed)
    drawn: dict[str, Shape] = {}
    while len(drawn) < count:
        text = _draw_id(rng)
        if text not in GRID and _cost(shape := Shape.parse(text)) <= _BUDGET:
            drawn[text] = shape
    return list(drawn.values())
