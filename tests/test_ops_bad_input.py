"""The ops called directly with what makes no sense raise RuntimeError and never crash."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastrnn  # noqa: F401  (registers the ops)
from bad_arguments import BAD, REFUSAL, good, good_packed, replaced, weights

ops = torch.ops.fastrnn


@pytest.mark.parametrize("changes", [{}, good_packed()], ids=["padded", "packed"])
def test_good_arguments_are_good(changes: dict[str, Any]) -> None:
    for op in (ops.recurrent, ops.recurrent_forward):
        assert all(output.isfinite().all() for output in op(**(good() | changes))[:3])


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("op", [ops.recurrent, ops.recurrent_forward], ids=["recurrent", "forward"])
@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_raises(changes: dict[str, Any], op: Any, requires_grad: bool) -> None:
    arguments = good()
    if requires_grad:
        arguments["weights"] = [weight.requires_grad_() for weight in arguments["weights"]]
    with pytest.raises(RuntimeError, match=REFUSAL):
        op(**(arguments | changes))


def test_sizes_are_counted_before_they_are_copied() -> None:
    sizes = torch.ones(1, dtype=torch.int64).expand(2**34)
    with pytest.raises(RuntimeError, match="fastrnn: batch_sizes has"):
        ops.recurrent(**(good() | good_packed(batch_sizes=sizes)))


def test_a_product_of_sizes_that_overflows() -> None:
    gates, one = 2**60, torch.ones(1)
    shapes = [(gates, 1), (gates, 1), (gates,), (gates,), (1, gates // 4)]
    huge = {"x": torch.ones(1, 1, 1), "weights": [one.expand(shape) for shape in shapes]}
    with pytest.raises(RuntimeError, match="fastrnn: x is too large"):
        ops.recurrent(**(good() | huge | {"h0": None, "c0": None}))


# What fakes cannot see: what is in sizes, so also the batch of packed input, and what fits into
# memory.
OF_DATA = [name for name in BAD if name.startswith("sizes_")]
OF_DATA += ["x_huge", "packed_h0_batch", "packed_c0_batch"]


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(
        allow_non_fake_inputs=True, shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)
    )


@pytest.mark.parametrize("name", [name for name in BAD if name not in OF_DATA])
def test_fakes_raise(name: str) -> None:
    with fake_mode(), pytest.raises(RuntimeError, match=REFUSAL):
        ops.recurrent(**(good() | BAD[name]))


@pytest.mark.parametrize("changes", [{}, good_packed()], ids=["padded", "packed"])
def test_fakes_take_good_arguments(changes: dict[str, Any]) -> None:
    with fake_mode():
        assert ops.recurrent(**(good() | changes))[0].shape[-1] == 8


def test_fake_packed_data_has_two_dimensions() -> None:
    with fake_mode(), pytest.raises(RuntimeError, match="dimensions"):
        ops.recurrent(**(good() | good_packed(x=torch.zeros(4, 3, 5))))


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(RuntimeError):
        ops.recurrent()
    with pytest.raises(RuntimeError):
        ops.recurrent(*good().values(), 1)


@pytest.mark.parametrize("name", ["recurrent_backward", "reference_backward"])
@pytest.mark.parametrize("count", [0, 3, 6, 8, 5000])
def test_needs_are_as_many_as_the_arguments(name: str, count: int) -> None:
    arguments = good()
    y, *_, reserve = ops.recurrent_forward(**arguments)
    arguments |= {"dy": y, "dh_n": None, "dc_n": None, "samples": None}
    if name == "recurrent_backward":
        arguments |= {"y": y, "reserve": reserve}
    else:
        del arguments["masks"], arguments["dropout"]
    backward = getattr(ops, name)
    assert len(backward(**arguments, needs=[True] * 7)) == 7
    with pytest.raises(RuntimeError, match="fastrnn: needs must have 7 entries"):
        backward(**arguments, needs=[True] * count)


@pytest.mark.parametrize("mode", ["RNN_TANH", "RNN_RELU"])
def test_rnn_has_no_cell_state_and_no_projection(mode: str) -> None:
    arguments = good() | {"mode": mode, "weights": weights(mode), "c0": None}
    assert ops.recurrent(**arguments)[0].shape == (4, 3, 8)
    with pytest.raises(RuntimeError):
        ops.recurrent(**(arguments | {"c0": torch.zeros(1, 3, 8)}))
    projected = [
        torch.zeros(8, 5),
        torch.zeros(8, 3),
        torch.zeros(8),
        torch.zeros(8),
        torch.zeros(3, 8),
    ]
    with pytest.raises(RuntimeError):
        ops.recurrent(**(arguments | {"weights": projected, "h0": None}))


SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 31, 32, 33])
SHAPES = st.lists(SIZES, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool])
TENSORS = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, DTYPES)
LIKELY_TENSORS = TENSORS | st.builds(torch.ones, SHAPES)
BATCH_SIZES = st.lists(st.integers(-1, 4), max_size=8).map(torch.tensor)
MUTATIONS = st.one_of(
    st.fixed_dictionaries({"x": LIKELY_TENSORS}),
    st.fixed_dictionaries({"h0": st.none() | LIKELY_TENSORS}),
    st.fixed_dictionaries({"c0": st.none() | LIKELY_TENSORS}),
    st.fixed_dictionaries(
        {
            "x": LIKELY_TENSORS,
            "batch_sizes": st.lists(st.integers(-1, 4), max_size=8).map(torch.tensor),
        }
    ),
    st.fixed_dictionaries({"num_layers": st.integers(-3, 3), "bidirectional": st.booleans()}),
    st.fixed_dictionaries({"mode": st.sampled_from(["RNN_TANH", "RNN_RELU", "LSTM", "x"])}),
    st.fixed_dictionaries({"has_biases": st.booleans(), "batch_first": st.booleans()}),
    st.fixed_dictionaries({"weights": st.lists(LIKELY_TENSORS, max_size=6)}),
    st.builds(replaced, st.integers(0, 3), LIKELY_TENSORS),
)


@given(mutations=st.lists(MUTATIONS, min_size=1, max_size=3))
def test_fuzz(mutations: list[dict[str, Any]]) -> None:
    arguments = good()
    for mutation in mutations:
        arguments |= mutation
    try:
        y, h_n, c_n = ops.recurrent(**arguments)
    except RuntimeError:
        return
    # What is accepted must have made sense: the sizes of the results follow from the arguments'.
    x, directions = arguments["x"], 1 + arguments["bidirectional"]
    assert y.shape[:-1] == x.shape[:-1] and y.dtype == x.dtype
    assert h_n.size(0) == arguments["num_layers"] * directions
    assert h_n.size(-1) * directions == y.size(-1)
    assert (c_n.numel() == 0) or c_n.shape[:-1] == h_n.shape[:-1]
