"""recurrent_backward called directly: what makes no sense raises RuntimeError, never crashes."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn  # noqa: F401  (registers the ops)
from bad_arguments import BAD, META, REFUSAL, good, good_packed
from helpers import Recorder, assert_equal

op = torch.ops.fastrnn.recurrent_backward.default
NAMES = [argument.name for argument in op._schema.arguments]
zeros = torch.zeros


def backward_arguments(changes: dict[str, Any]) -> dict[str, Any]:
    """Returns what autograd gives the op for the loss sum(y) + sum(h_n) + sum(c_n), by name."""
    arguments = good() | changes
    for tensor in (arguments["x"], arguments["h0"], arguments["c0"], *arguments["weights"]):
        tensor.requires_grad_()
    with Recorder("fastrnn::recurrent_backward") as recorder:
        outputs = torch.ops.fastrnn.recurrent(**arguments)
        torch.stack([output.sum() for output in outputs]).sum().backward()
    ((args, kwargs),) = recorder.calls
    return dict(zip(NAMES, args, strict=False)) | kwargs


BAD_GRADIENTS: dict[str, dict[str, Any]] = {
    "dy_steps": {"dy": zeros(3, 3, 8)},
    "dy_batch": {"dy": zeros(4, 2, 8)},
    "dy_units": {"dy": zeros(4, 3, 7)},
    "dy_2d": {"dy": zeros(12, 8)},
    "dy_0d": {"dy": zeros(())},
    "dy_double": {"dy": zeros(4, 3, 8, dtype=torch.float64)},
    "dy_meta": {"dy": zeros(4, 3, 8, **META)},
    "dh_n_layers": {"dh_n": zeros(2, 3, 8)},
    "dh_n_batch": {"dh_n": zeros(1, 2, 8)},
    "dh_n_units": {"dh_n": zeros(1, 3, 7)},
    "dh_n_2d": {"dh_n": zeros(3, 8)},
    "dh_n_double": {"dh_n": zeros(1, 3, 8, dtype=torch.float64)},
    "dc_n_units": {"dc_n": zeros(1, 3, 9)},
    "dc_n_batch": {"dc_n": zeros(1, 1, 8)},
    "dc_n_int": {"dc_n": zeros(1, 3, 8, dtype=torch.int64)},
    "y_steps": {"y": zeros(3, 3, 8)},
    "y_units": {"y": zeros(4, 3, 7)},
    "y_empty": {"y": zeros(0)},
    "y_0d": {"y": zeros(())},
    "y_double": {"y": zeros(4, 3, 8, dtype=torch.float64)},
    "y_meta": {"y": zeros(4, 3, 8, **META)},
    "reserve_empty": {"reserve": zeros(0)},
    "reserve_small": {"reserve": zeros(7)},
    "reserve_0d": {"reserve": zeros(())},
    "reserve_meta": {"reserve": zeros(10**6, **META)},
    "x_steps": {"x": torch.ones(5, 3, 5)},
    "x_many_steps": {"x": torch.ones(4000, 3, 5)},
    "x_wide_batch": {"x": torch.ones(4, 300, 5), "h0": None, "c0": None},
    "needs_none": {"needs": []},
    "needs_few": {"needs": [True]},
    "needs_many": {"needs": [True] * 50},
}


@pytest.mark.parametrize("changes", [{}, good_packed()], ids=["padded", "packed"])
def test_good_arguments_are_good(changes: dict[str, Any]) -> None:
    arguments = backward_arguments(changes)
    first, second = op(**arguments), op(**arguments)
    assert len(first) == 7 and all(gradient.isfinite().all() for gradient in first)
    assert_equal(dict(enumerate(second)), dict(enumerate(first)))


@pytest.mark.parametrize("changes", (BAD | BAD_GRADIENTS).values(), ids=BAD | BAD_GRADIENTS)
def test_raises(changes: dict[str, Any]) -> None:
    arguments = backward_arguments({})
    assert changes.keys() <= arguments.keys()
    with pytest.raises(RuntimeError, match=REFUSAL):
        op(**(arguments | changes))


@pytest.mark.parametrize("length", ["cut", "doubled", "half"])
def test_reserve_of_another_size_or_dtype(length: str) -> None:
    arguments = backward_arguments({})
    reserve = arguments["reserve"]
    changed = {"cut": reserve[:-1], "doubled": reserve.double(), "half": reserve.half()}[length]
    with pytest.raises(RuntimeError):
        op(**(arguments | {"reserve": changed}))


@pytest.mark.parametrize(
    "changes", [{"x": zeros(4, 0, 5)}, {"x": zeros(0, 4, 5), "batch_first": True}]
)
def test_weights_have_zero_gradients_of_no_rows(changes: dict[str, Any]) -> None:
    arguments = backward_arguments(changes | {"h0": zeros(1, 0, 8), "c0": zeros(1, 0, 8)})
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        results = op(**arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(not gradient.any() for gradient in results)


@pytest.mark.parametrize("name", ["dy", "dh_n", "dc_n", "x", "h0", "c0", "y", "reserve"])
def test_strides(name: str) -> None:
    # No two numbers are alike: where strides were taken for others, another would be read.
    torch.manual_seed(0)
    drawn = {key: torch.randn_like(t) for key, t in good().items() if isinstance(t, Tensor)}
    weights = [torch.randn_like(weight) for weight in good()["weights"]]
    arguments = backward_arguments(drawn | {"weights": weights})
    arguments |= {key: torch.randn_like(arguments[key]) for key in ("dy", "dh_n", "dc_n")}
    tensor = arguments[name]
    assert isinstance(tensor, Tensor)
    strided = tensor.detach().repeat_interleave(2, dim=-1)[..., ::2]
    results = op(**(arguments | {name: strided}))
    assert_equal(dict(enumerate(results)), dict(enumerate(op(**arguments))))
