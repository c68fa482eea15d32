"""Arguments of the ops that are right, and changes that make them wrong."""

from typing import Any

import torch
from torch import Tensor

# How errors begin: fastrnn's own, and torch's for what no op takes, as a tensor that is undefined.
REFUSAL = r"^fastrnn: |^fastrnn::\w+\(\)|^Could not run 'fastrnn::|^tensor does not have a device"

zeros = torch.zeros
META = {"device": "meta"}


def weights(mode: str = "LSTM", **options: Any) -> list[Tensor]:
    """Returns the weights of one layer of 5 inputs and 8 units."""
    rows = 32 if mode == "LSTM" else 8
    shapes = [(rows, 5), (rows, 8), (rows,), (rows,)]
    return [torch.full(shape, 0.1, **options) for shape in shapes]


def good() -> dict[str, Any]:
    """Returns arguments that are right: T4 N3 I5 H8."""
    return {
        "mode": "LSTM",
        "x": torch.ones(4, 3, 5),
        "batch_sizes": None,
        "h0": zeros(1, 3, 8),
        "c0": zeros(1, 3, 8),
        "weights": weights(),
        "num_layers": 1,
        "has_biases": True,
        "bidirectional": False,
        "batch_first": False,
        "masks": None,
        "dropout": 0.0,
    }


def good_packed(**changes: Any) -> dict[str, Any]:
    """Returns changes to `good` that make its input packed, and then `changes`."""
    return {"x": torch.ones(7, 5), "batch_sizes": torch.tensor([3, 2, 2])} | changes


def replaced(index: int, weight: Tensor) -> dict[str, list[Tensor]]:
    """Returns a change to one weight."""
    changed = weights()
    changed[index] = weight
    return {"weights": changed}


BOOL: Any = {"dtype": torch.bool}


def two_layers(masks: Tensor | None = None) -> dict[str, Any]:
    """Returns changes to `good` that make it a stack of two layers with such masks."""
    above = [zeros(32, 8), *weights()[1:]]
    states = {"h0": zeros(2, 3, 8), "c0": zeros(2, 3, 8)}
    return states | {"weights": weights() + above, "num_layers": 2, "masks": masks}


BATCH_FIRST = {"batch_first": True, "h0": None, "c0": None}

BAD: dict[str, dict[str, Any]] = {
    "mode_unknown": {"mode": "GRU"},
    "mode_empty": {"mode": ""},
    "mode_lower": {"mode": "lstm"},
    "mode_of_other_weights": {"mode": "RNN_TANH"},
    "mode_number": {"mode": 1},
    "x_none": {"x": None},
    "x_0d": {"x": zeros(())},
    "x_1d": {"x": zeros(5)},
    "x_4d": {"x": zeros(1, 4, 3, 5)},
    "x_features": {"x": zeros(4, 3, 6)},
    "x_no_features": {"x": zeros(4, 3, 0)},
    "x_no_steps": {"x": zeros(0, 3, 5)},
    "x_batch": {"x": zeros(4, 2, 5)},
    "x_unbatched_h0_batched": {"x": zeros(4, 5)},
    "x_double": {"x": zeros(4, 3, 5, dtype=torch.float64)},
    "x_int": {"x": zeros(4, 3, 5, dtype=torch.int64)},
    "x_complex": {"x": zeros(4, 3, 5, dtype=torch.complex64)},
    "x_meta": {"x": zeros(4, 3, 5, **META)},
    "x_sparse": {"x": torch.ones(4, 3, 5).to_sparse()},
    "x_huge": {"x": zeros(1, 1, 5).expand(2**30, 2**30, 5), "h0": None, "c0": None},
    "all_int": {
        "x": zeros(4, 3, 5, dtype=torch.int64),
        "h0": None,
        "c0": None,
        "weights": [weight.long() for weight in weights()],
    },
    "batch_first_swaps": {"batch_first": True},
    "h0_2d": {"h0": zeros(3, 8)},
    "h0_4d": {"h0": zeros(1, 1, 3, 8)},
    "h0_layers": {"h0": zeros(2, 3, 8)},
    "h0_no_layers": {"h0": zeros(0, 3, 8)},
    "h0_batch": {"h0": zeros(1, 4, 8)},
    "h0_batch_of_one": {"h0": zeros(1, 1, 8)},
    "h0_units": {"h0": zeros(1, 3, 7)},
    "h0_double": {"h0": zeros(1, 3, 8, dtype=torch.float64)},
    "h0_meta": {"h0": zeros(1, 3, 8, **META)},
    "h0_string": {"h0": "a"},
    "c0_2d": {"c0": zeros(3, 8)},
    "c0_batch": {"c0": zeros(1, 2, 8)},
    "c0_units": {"c0": zeros(1, 3, 9)},
    "c0_double": {"c0": zeros(1, 3, 8, dtype=torch.float64)},
    "c0_meta": {"c0": zeros(1, 3, 8, **META)},
    "weights_none": {"weights": []},
    "weights_missing": {"weights": weights()[:3]},
    "weights_too_many": {"weights": weights() * 2},
    "weights_hold_none": {"weights": [*weights()[:3], None]},
    "weights_biases_missing": {"weights": weights()[:2]},
    "weights_biases_unannounced": {"has_biases": False},
    "weights_swapped": {"weights": weights()[::-1]},
    "weights_double": {"weights": weights(dtype=torch.float64)},
    "weights_meta": {"weights": weights(**META)},
    "w_ih_rows": replaced(0, zeros(33, 5)),
    "w_ih_few_rows": replaced(0, zeros(4, 5)),
    "w_ih_columns": replaced(0, zeros(32, 4)),
    "w_ih_1d": replaced(0, zeros(32)),
    "w_ih_0d": replaced(0, zeros(())),
    "w_ih_3d": replaced(0, zeros(32, 5, 1)),
    "w_ih_empty": replaced(0, zeros(0, 5)),
    "w_hh_rows": replaced(1, zeros(8, 8)),
    "w_hh_columns": replaced(1, zeros(32, 7)),
    "w_hh_no_columns": replaced(1, zeros(32, 0)),
    "w_hh_1d": replaced(1, zeros(32)),
    "w_hh_0d": replaced(1, zeros(())),
    "w_hh_double": replaced(1, zeros(32, 8, dtype=torch.float64)),
    "w_hh_meta": replaced(1, zeros(32, 8, **META)),
    "b_ih_size": replaced(2, zeros(31)),
    "b_ih_2d": replaced(2, zeros(32, 1)),
    "b_hh_size": replaced(3, zeros(0)),
    "b_hh_double": replaced(3, zeros(32, dtype=torch.float64)),
    "no_features": {"x": zeros(4, 3, 0), **replaced(0, zeros(32, 0))},
    "no_units": {
        "weights": [zeros(0, 5), zeros(0, 3), zeros(0), zeros(0), zeros(3, 0)],
        "h0": None,
        "c0": None,
    },
    "no_projected_units": {
        "weights": [zeros(32, 5), zeros(32, 0), zeros(32), zeros(32), zeros(0, 8)],
        "h0": None,
    },
    "w_hr_unannounced": {"weights": [*weights(), zeros(3, 8)]},
    "num_layers_zero": {"num_layers": 0},
    "num_layers_negative": {"num_layers": -1},
    "num_layers_two": {"num_layers": 2},
    "num_layers_huge": {"num_layers": 2**62},
    "num_layers_beyond_int64": {"num_layers": 2**64},
    "num_layers_float": {"num_layers": 1.5},
    "bidirectional": {"bidirectional": True},
    "masks_of_one_layer": {"masks": zeros(1, 4, 3, 8, **BOOL)},
    "masks_number": {"masks": 0.5},
    "dropout_negative": {"dropout": -0.5},
    "dropout_above_one": {"dropout": 1.5},
    "dropout_nan": {"dropout": float("nan")},
    "masks_steps": two_layers(zeros(1, 3, 3, 8, **BOOL)),
    "masks_batch": two_layers(zeros(1, 4, 2, 8, **BOOL)),
    "masks_units": two_layers(zeros(1, 4, 3, 7, **BOOL)),
    "masks_batch_first": two_layers(zeros(1, 4, 3, 8, **BOOL)) | BATCH_FIRST,
    "masks_2d": two_layers(zeros(1, 12, 8, **BOOL)),
    "masks_0d": two_layers(zeros((), **BOOL)),
    "masks_float": two_layers(zeros(1, 4, 3, 8)),
    "masks_meta": two_layers(zeros(1, 4, 3, 8, **BOOL, **META)),
    "masks_too_many": two_layers(zeros(2, 4, 3, 8, **BOOL)),
    "masks_without_layers": two_layers(zeros(4, 3, 8, **BOOL)),
    "masks_packed": good_packed(**two_layers(zeros(1, 3, 3, 8, **BOOL))),
    "sizes_of_3d": {"batch_sizes": torch.tensor([3, 2, 2])},
    "sizes_increasing": good_packed(batch_sizes=torch.tensor([3, 1, 3])),
    "sizes_zero": good_packed(batch_sizes=torch.tensor([3, 4, 0])),
    "sizes_negative": good_packed(batch_sizes=torch.tensor([3, 5, -1])),
    "sizes_negative_first": good_packed(batch_sizes=torch.tensor([-1, 8])),
    "sizes_too_many": good_packed(batch_sizes=torch.tensor([3, 3, 3])),
    "sizes_too_few": good_packed(batch_sizes=torch.tensor([3, 2])),
    "sizes_overflow": good_packed(batch_sizes=torch.tensor([2**62, 2**62, 2**62, 2**62, 7])),
    "sizes_long": good_packed(batch_sizes=torch.ones(100, dtype=torch.int64)),
    "sizes_none": good_packed(batch_sizes=torch.tensor([], dtype=torch.int64)),
    "sizes_2d": good_packed(batch_sizes=torch.tensor([[3, 2, 2]])),
    "sizes_0d": good_packed(batch_sizes=torch.tensor(7)),
    "sizes_int32": good_packed(batch_sizes=torch.tensor([3, 2, 2], dtype=torch.int32)),
    "sizes_float": good_packed(batch_sizes=torch.tensor([3.0, 2.0, 2.0])),
    "sizes_meta": good_packed(batch_sizes=zeros(3, dtype=torch.int64, **META)),
    "packed_x_no_rows": good_packed(x=zeros(0, 5)),
    "packed_x_1d": good_packed(x=zeros(7)),
    "packed_x_features": good_packed(x=zeros(7, 4)),
    "packed_h0_batch": good_packed(h0=zeros(1, 2, 8)),
    "packed_h0_2d": good_packed(h0=zeros(1, 8), c0=zeros(1, 8)),
    "packed_c0_batch": good_packed(c0=zeros(1, 4, 8)),
}
