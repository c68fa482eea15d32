"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: their matrix products."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.fastrnn

Shape = torch.Size


def _products(x: Shape, weights: list[Shape]) -> list[int]:
    """Returns the operations of each weight's product; 0 for biases.

    Each row of each step is multiplied by every matrix once.
    """
    rows = prod(x[:-1])
    return [2 * rows * prod(weight) if len(weight) == 2 else 0 for weight in weights]


@register_flop_formula([_ops.recurrent, _ops.recurrent_forward])
def _recurrent(
    mode: str,
    x: Shape,
    batch_sizes: Any,
    h0: Any,
    c0: Any,
    weights: list[Shape],
    *_options: Any,
    **_: Any,
) -> int:
    return sum(_products(x, weights))


@register_flop_formula(_ops.cell)
def _cell(mode: str, x: Shape, h0: Any, c0: Any, weights: list[Shape], *_: Any, **__: Any) -> int:
    return sum(_products(x, weights))


@register_flop_formula(_ops.recurrent_backward)
def _recurrent_backward(
    mode: str,
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    x: Shape,
    batch_sizes: Any,
    h0: Any,
    c0: Any,
    weights: list[Shape],
    y: Any,
    reserve: Any,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    needs: list[bool],
    **_: Any,
) -> int:
    products = _products(x, weights)
    needs_x, _h0, _c0, *needs_weights = needs
    of_weights = sum(p for p, needed in zip(products, needs_weights, strict=True) if needed)
    directions = 2 if bidirectional else 1
    weights_per_cell = len(weights) // (num_layers * directions)
    of_x = sum(products[: directions * weights_per_cell : weights_per_cell])
    return of_weights + sum(products) - (0 if needs_x else of_x)
