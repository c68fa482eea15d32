"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: their matrix products."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

_ops = torch.ops.fastrnn
# A second import, after the first was dropped or stopped, registers anew: torch refuses that.
for _name in ("recurrent", "recurrent_forward", "recurrent_backward", "output_again", "cell"):
    flop_registry.pop(getattr(_ops, _name), None)

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


@register_flop_formula(_ops.output_again)
def _output_again(
    mode: str,
    x: Shape,
    batch_sizes: Any,
    h0: Any,
    c0: Any,
    weights: list[Shape],
    reserve: Any,
    num_layers: int,
    *_options: Any,
    **_: Any,
) -> int:
    return sum(_products(x, weights[-(len(weights) // num_layers) :]))


@register_flop_formula(_ops.cell)
def _cell(mode: str, x: Shape, h0: Any, c0: Any, weights: list[Shape], *_: Any, **__: Any) -> int:
    return sum(_products(x, weights))


@register_flop_formula(_ops.recurrent_backward, get_raw=True)
def _recurrent_backward(
    mode: str,
    dy: Any,
    dh_n: Any,
    dc_n: Any,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Any,
    c0: Any,
    weights: list[Tensor],
    y: Any,
    reserve: Any,
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    masks: Any,
    dropout: float,
    needs: list[bool],
    samples: int | None = None,
    **_: Any,
) -> int:
    products = _products(x.shape, [weight.shape for weight in weights])
    needs_x, needs_h0, _c0, *needs_weights = needs
    total = sum(products)
    total += sum(p for p, needed in zip(products, needs_weights, strict=True) if needed)
    directions = 2 if bidirectional else 1
    per_strand = len(weights) // (num_layers * directions)
    if not needs_x:
        total -= sum(products[: directions * per_strand : per_strand])
    if not needs_h0:  # nothing goes back from the first step
        if batch_sizes is not None:
            first_rows = int(batch_sizes[0])
        else:
            first_rows = x.shape[:-1].numel() // x.size(1 if batch_first and x.dim() == 3 else 0)
        total -= 2 * first_rows * sum(w_hh.numel() for w_hh in weights[1::per_strand])
    return total
