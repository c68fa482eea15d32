"""What torch.nn rejects is rejected with the same exception and the same words.

Each action below is taken with both libraries. What one of them raises, the other must raise; an
odd input that torch.nn accepts must be accepted, with the same result.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close

import fastrnn
from helpers import Case, Recorder, build, cases

CLASSES = ["RNN", "LSTM"]
OTHER = {"RNN": "LSTM", "LSTM": "RNN"}
zeros = torch.zeros


def outcome(action: Callable[[ModuleType, str], object], package: ModuleType, name: str) -> object:
    """Returns what `action` returns, or the type and text of what it raises."""
    torch.manual_seed(0)
    try:
        return action(package, name)
    except Exception as error:
        return type(error), str(error)


def assert_same_outcome(action: Callable[[ModuleType, str], object], name: str) -> None:
    """Asserts that `action` has the same outcome with both libraries."""
    ours, theirs = (outcome(action, package, name) for package in (fastrnn, nn))
    if isinstance(theirs, tuple) and isinstance(theirs[0], type):
        assert ours == theirs
    else:
        assert_close(ours, theirs, equal_nan=True)


CONSTRUCTORS: dict[str, tuple[tuple, dict]] = {
    "no_arguments": ((), {}),
    "no_hidden_size": ((5,), {}),
    "input_size_float": ((5.0, 8), {}),
    "input_size_zero": ((0, 8), {}),
    "input_size_negative": ((-1, 8), {}),
    "input_size_string": (("5", 8), {}),
    "hidden_size_float": ((5, 8.0), {}),
    "hidden_size_zero": ((5, 0), {}),
    "hidden_size_none": ((5, None), {}),
    "num_layers_zero": ((5, 8, 0), {}),
    "num_layers_negative": ((5, 8), {"num_layers": -2}),
    "num_layers_float": ((5, 8), {"num_layers": 1.5}),
    "dropout_above_one": ((5, 8), {"dropout": 1.5}),
    "dropout_negative": ((5, 8), {"dropout": -0.1}),
    "dropout_bool": ((5, 8), {"dropout": True}),
    "dropout_string": ((5, 8), {"dropout": "a"}),
    "bias_int": ((5, 8), {"bias": 1}),
    "batch_first_int": ((5, 8), {"batch_first": 1}),
    "bias_positional_string": ((5, 8, 1, "tanh"), {}),
    "nonlinearity_unknown": ((5, 8), {"nonlinearity": "sigmoid"}),
    "nonlinearity_unknown_positional": ((5, 8, 1, "sigmoid"), {}),
    "nonlinearity_none": ((5, 8), {"nonlinearity": None}),
    "proj_size": ((5, 8), {"proj_size": 2}),
    "proj_size_zero": ((5, 8), {"proj_size": 0}),
    "proj_size_negative": ((5, 8), {"proj_size": -1}),
    "proj_size_too_large": ((5, 8), {"proj_size": 8}),
    "unknown_option": ((5, 8), {"colour": 1}),
    "dtype_integer": ((5, 8), {"dtype": torch.int64}),
    "device_unknown": ((5, 8), {"device": "nowhere"}),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("arguments", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructor(arguments: tuple[tuple, dict], name: str) -> None:
    args, kwargs = arguments

    def construct(package: ModuleType, name: str) -> str:
        try:
            return repr(getattr(package, name)(*args, **kwargs))
        except TypeError as error:  # in which Python may name the base class
            raise TypeError(str(error).replace("RNNBase.", f"{name}.")) from None

    # torch.nn.LSTM(5, 8, 1, "tanh") and the like: what each makes of it is compared as text.
    ours, theirs = (outcome(construct, package, name) for package in (fastrnn, nn))
    assert ours == theirs


@pytest.mark.parametrize("name", CLASSES)
def test_constructor_of_too_many(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}.__init__\(\) takes from 3 to 11 positional"):
        getattr(fastrnn, name)(5, 8, *range(12))


def states(*shape: int, name: str, **options: object) -> Tensor | tuple[Tensor, Tensor]:
    """Returns what class `name` takes as hx, of zeros."""
    return zeros(shape, **options) if name == "RNN" else (zeros(shape, **options),) * 2


X = torch.linspace(-1, 1, 60).view(4, 3, 5)
DOUBLE, INT = torch.float64, torch.int64

# Name: x, then hx as a function of the class's name, for a module of 5 inputs and 8 units.
CALLS: dict[str, tuple[object, Callable | None]] = {
    "x_string": ("a", None),
    "x_none": (None, None),
    "x_list": ([[1.0]], None),
    "x_0d": (zeros(()), None),
    "x_1d": (zeros(5), None),
    "x_4d": (zeros(1, 4, 3, 5), None),
    "x_features": (zeros(4, 3, 6), None),
    "x_features_unbatched": (zeros(4, 6), None),
    "x_no_features": (zeros(4, 3, 0), None),
    "x_no_steps": (zeros(0, 3, 5), None),
    "x_no_steps_unbatched": (zeros(0, 5), None),
    "x_empty": (zeros(0, 0, 5), None),
    "x_double": (zeros(4, 3, 5, dtype=DOUBLE), None),
    "x_half": (zeros(4, 3, 5, dtype=torch.float16), None),
    "x_int": (zeros(4, 3, 5, dtype=INT), None),
    "x_bool": (zeros(4, 3, 5, dtype=torch.bool), None),
    "x_complex": (zeros(4, 3, 5, dtype=torch.complex64), None),
    "x_meta": (zeros(4, 3, 5, device="meta"), None),
    "x_sparse": (X.to_sparse(), None),
    "hx_string": (X, lambda name: "a"),
    "hx_number": (X, lambda name: 0),
    "hx_of_the_other_class": (X, lambda name: states(1, 3, 8, name=OTHER[name])),
    "hx_2d": (X, partial(states, 3, 8)),
    "hx_1d": (X, partial(states, 8)),
    "hx_4d": (X, partial(states, 1, 1, 3, 8)),
    "hx_3d_unbatched": (X[:, 0], partial(states, 1, 1, 8)),
    "hx_layers": (X, partial(states, 2, 3, 8)),
    "hx_batch": (X, partial(states, 1, 4, 8)),
    "hx_batch_of_one": (X, partial(states, 1, 1, 8)),
    "hx_batch_first": (X, partial(states, 3, 1, 8)),
    "hx_units": (X, partial(states, 1, 3, 7)),
    "hx_units_unbatched": (X[:, 0], partial(states, 1, 7)),
    "hx_layers_unbatched": (X[:, 0], partial(states, 2, 8)),
    "hx_double": (X, partial(states, 1, 3, 8, dtype=DOUBLE)),
    "hx_int": (X, partial(states, 1, 3, 8, dtype=INT)),
    "hx_meta": (X, partial(states, 1, 3, 8, device="meta")),
    "hx_one_tuple": (X, lambda name: (zeros(1, 3, 8),)),
    "hx_three_tuple": (X, lambda name: (zeros(1, 3, 8),) * 3),
    "hx_list": (X, lambda name: [zeros(1, 3, 8)] * 2),
    "hx_generator": (X, lambda name: (zeros(1, 3, 8) for _ in range(2))),
    "hx_stacked": (X, lambda name: zeros(2, 1, 3, 8)),
    "hx_dict": (X, lambda name: {0: zeros(1, 3, 8), 1: zeros(1, 3, 8)}),
    "hx_tuple_of_none": (X, lambda name: (None, None)),
    "hx_empty_tuple": (X, lambda name: ()),
    "h0_alone": (X, lambda name: (zeros(1, 3, 8), None)),
    "c0_alone": (X, lambda name: (None, zeros(1, 3, 8))),
    "c0_units": (X, lambda name: (zeros(1, 3, 8), zeros(1, 3, 7))),
    "c0_double": (X, lambda name: (zeros(1, 3, 8), zeros(1, 3, 8, dtype=DOUBLE))),
    "c0_2d": (X, lambda name: (zeros(1, 3, 8), zeros(3, 8))),
}


def call_module(
    x: object, hx: Callable | None, package: ModuleType, name: str, **options: object
) -> object:
    """Calls a module of 5 inputs and 8 units."""
    module = getattr(package, name)(5, 8, **options)
    return module(x) if hx is None else module(x, hx(name=name))


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_call(arguments: tuple[object, Callable | None], name: str, batch_first: bool) -> None:
    assert_same_outcome(partial(call_module, *arguments, batch_first=batch_first), name)


def packed(batch_sizes: object, rows: int = 7, **options: object) -> PackedSequence:
    """Returns a PackedSequence of 5 features that nothing has checked."""
    sizes = batch_sizes if isinstance(batch_sizes, Tensor) else torch.tensor(batch_sizes)
    return PackedSequence(torch.ones(rows, 5, **options), sizes)


UNSORTED = pack_sequence([X[:2, 0], X[:4, 1], X[:1, 2]], enforce_sorted=False)
GOOD = packed([3, 3, 1])

PACKED_CALLS: dict[str, tuple[PackedSequence, Callable | None]] = {
    "good": (GOOD, None),
    "features": (PackedSequence(zeros(7, 6), torch.tensor([3, 3, 1])), None),
    "data_1d": (PackedSequence(zeros(7), torch.tensor([3, 3, 1])), None),
    "data_3d": (PackedSequence(zeros(7, 1, 5), torch.tensor([3, 3, 1])), None),
    "double": (packed([3, 3, 1], dtype=DOUBLE), None),
    "increasing": (packed([3, 1, 3]), None),
    "too_many": (packed([3, 3, 3]), None),
    "too_few": (packed([3, 2, 1]), None),
    "first_too_large": (packed([8]), None),
    "zero_inside": (packed([3, 0, 4]), None),
    "zeros": (packed([0, 0], rows=0), None),
    "negative": (packed([-1, 8]), None),
    "none": (packed(torch.tensor([], dtype=INT)), None),
    "none_of_none": (packed(torch.tensor([], dtype=INT), rows=0), None),
    "int32": (packed(torch.tensor([3, 3, 1], dtype=torch.int32)), None),
    "float": (packed([3.0, 3.0, 1.0]), None),
    "sizes_2d": (packed([[3, 3, 1]]), None),
    "hx_2d": (GOOD, partial(states, 3, 8)),
    "hx_batch_large": (GOOD, partial(states, 1, 4, 8)),
    "hx_batch_small": (GOOD, partial(states, 1, 2, 8)),
    "hx_batch_of_one": (GOOD, partial(states, 1, 1, 8)),
    "hx_layers": (GOOD, partial(states, 2, 3, 8)),
    "hx_units": (GOOD, partial(states, 1, 3, 7)),
    "hx_double": (GOOD, partial(states, 1, 3, 8, dtype=DOUBLE)),
    "hx_meta": (GOOD, partial(states, 1, 3, 8, device="meta")),
    "unsorted_hx_batch_large": (UNSORTED, partial(states, 1, 4, 8)),
    "unsorted_hx_batch_small": (UNSORTED, partial(states, 1, 2, 8)),
    "unsorted_hx_units": (UNSORTED, partial(states, 1, 3, 7)),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("arguments", PACKED_CALLS.values(), ids=PACKED_CALLS)
def test_packed_call(arguments: tuple[PackedSequence, Callable | None], name: str) -> None:
    assert_same_outcome(partial(call_module, *arguments), name)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((X, None, None), {}), ((X,), {"h0": None}), ((), {"input": X}), ((), {"x": X})],
    ids=["none", "three", "unknown", "input", "x"],
)
def test_arguments(args: tuple, kwargs: dict, name: str) -> None:
    assert_same_outcome(lambda package, name: getattr(package, name)(5, 8)(*args, **kwargs), name)


# Name: the parameter and its replacement, in float64: torch.nn's float32 LSTM reads past the end
# of a weight that is too small.
WEIGHTS: dict[str, tuple[str, object]] = {
    "ih_rows": ("weight_ih_l0", zeros(7, 5, dtype=DOUBLE)),
    "ih_columns": ("weight_ih_l0", zeros(32, 6, dtype=DOUBLE)),
    "ih_1d": ("weight_ih_l0", zeros(32, dtype=DOUBLE)),
    "hh_rows": ("weight_hh_l0", zeros(7, 8, dtype=DOUBLE)),
    "hh_columns": ("weight_hh_l0", zeros(32, 4, dtype=DOUBLE)),
    "bias_size": ("bias_ih_l0", zeros(3, dtype=DOUBLE)),
    "bias_of_one": ("bias_ih_l0", torch.ones(1, dtype=DOUBLE)),
    "bias_hh_of_one": ("bias_hh_l0", torch.ones(1, dtype=DOUBLE)),
    "none": ("weight_hh_l0", None),
    "bias_none": ("bias_hh_l0", None),
    "float32": ("weight_hh_l0", zeros(32, 8)),
    "ih_float32": ("weight_ih_l0", zeros(32, 5)),
    "bias_float32": ("bias_ih_l0", zeros(32)),
    "meta": ("weight_hh_l0", zeros(32, 8, dtype=DOUBLE, device="meta")),
    "int": ("weight_hh_l0", zeros(32, 8, dtype=INT)),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weight(weight: tuple[str, Tensor | None], name: str) -> None:
    parameter, value = weight

    def action(package: ModuleType, name: str) -> object:
        module = getattr(package, name)(5, 8, dtype=DOUBLE)
        replacement = value
        if value is not None:
            rows = 8 if name == "RNN" and value.size(0) == 32 else value.size(0)
            replacement = nn.Parameter(value[:rows], requires_grad=False)
        setattr(module, parameter, replacement)
        return module(X.double())

    assert_same_outcome(action, name)


@pytest.mark.parametrize("shape", [(8, 5), (32, 4), (32,)], ids=["rows", "columns", "1d"])
@pytest.mark.parametrize("parameter", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lstm_checks_the_weights_that_torch_does_not(
    dtype: torch.dtype, parameter: str, shape: tuple[int, ...]
) -> None:
    module = fastrnn.LSTM(5, 8, dtype=dtype)
    setattr(module, parameter, nn.Parameter(zeros(shape, dtype=dtype)))
    with pytest.raises(RuntimeError, match=r"^fastrnn: weight"):
        module(X.to(dtype))


@pytest.mark.parametrize("case", cases(hx=[True]), ids=str)
def test_a_rejected_call_leaves_the_module_usable(case: Case) -> None:
    module = build(fastrnn, case)
    expected = module(torch.ones(7, 3, 5))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        module(torch.ones(7, 3, 6))
    assert_close(module(torch.ones(7, 3, 5)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", CLASSES)
def test_warnings(name: str, num_layers: int) -> None:
    found = []
    for package in (fastrnn, nn):
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            getattr(package, name)(5, 8, num_layers, dropout=0.5)
        found.append([(record.category, str(record.message)) for record in records])
    assert found[0] == found[1]
    assert len(found[0]) == (num_layers == 1)


NESTED = torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(2, 5)])


@pytest.mark.parametrize("name", [*CLASSES, "RNNCell", "LSTMCell"])
def test_nested_tensors(name: str) -> None:
    assert_same_outcome(lambda package, name: getattr(package, name)(5, 8)(NESTED), name)


FAKES = {"features": ((4, 3, 6), None), "dimensions": ((4, 3, 2, 5), None)}
FAKES |= {"hidden": ((4, 3, 5), (1, 3, 7)), "layers": ((4, 3, 5), (2, 3, 8))}
FAKES |= {"unbatched": ((4, 3, 5), (1, 8)), "scalar": ((4, 3, 5), ())}
FAKES |= {"good": ((4, 3, 5), (1, 3, 8))}


# No kernel runs there, which would look at the sizes.
@pytest.mark.parametrize("sizes", FAKES.values(), ids=FAKES)
@pytest.mark.parametrize("name", CLASSES)
def test_fake_tensors(sizes: tuple[tuple[int, ...], tuple[int, ...] | None], name: str) -> None:
    def action(package: ModuleType, name: str) -> tuple[int, ...]:
        module = getattr(package, name)(5, 8)
        x, hx = (None if size is None else zeros(size) for size in sizes)
        state = (hx, hx) if name == "LSTM" and hx is not None else hx
        return tuple(module(x, state)[0].shape)

    with FakeTensorMode():
        assert_same_outcome(action, name)


# Of sequences of one length torch.nn.LSTM checks none of these: it gives numbers that nobody
# computed, or ends the process.
@pytest.mark.parametrize(
    ("features", "sizes"),
    [(6, None), (3, None), (5, (1, 2, 7)), (5, (1, 2, 9)), (5, (1, 3, 8)), (5, (2, 2, 8))],
)
@pytest.mark.parametrize("lengths", [[2, 2, 2], [2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sizes_that_torch_does_not_check(
    features: int, sizes: tuple[int, int, int] | None, lengths: list[int], dtype: torch.dtype
) -> None:
    rows = zeros(sum(lengths), features, dtype=dtype)
    hx = None if sizes is None else (zeros(sizes, dtype=dtype),) * 2
    with pytest.raises(RuntimeError, match=r"^fastrnn: (weight_ih|h0) must have size"):
        fastrnn.LSTM(5, 8, dtype=dtype)(PackedSequence(rows, torch.tensor(lengths)), hx)


@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {"proj_size": 3}), ("LSTM", {"dtype": DOUBLE}), ("LSTM", {}), ("RNN", {})],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(6, 8), (5, 7)])
def test_packed_sizes_of_one_length_that_torch_checks(
    sizes: tuple[int, int], name: str, options: dict[str, object]
) -> None:
    features, units = sizes
    dtype = options.get("dtype", torch.float32)
    rows = PackedSequence(zeros(6, features, dtype=dtype), torch.tensor([2, 2, 2]))
    h0 = zeros(1, 2, options.get("proj_size", units), dtype=dtype)
    hx = (h0, zeros(1, 2, 7, dtype=dtype)) if name == "LSTM" else h0

    def call(package: ModuleType, name: str) -> object:
        return getattr(package, name)(5, 8, **options)(rows, hx)

    with torch.backends.mkldnn.flags(enabled=name == "RNN" or bool(options)):
        assert_same_outcome(call, name)


# torch.nn.LSTM ends the process with these.
@pytest.mark.parametrize("layers", [(2, 1), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_states_that_torch_reads_past(layers: tuple[int, int], dtype: torch.dtype) -> None:
    packed = PackedSequence(zeros(5, 3, dtype=dtype), torch.tensor([2, 2, 1]))
    states = tuple(zeros(count, 2, 4, dtype=dtype) for count in layers)
    with pytest.raises(RuntimeError, match=r"^fastrnn: [hc]0 must have size"):
        fastrnn.LSTM(3, 4, dtype=dtype)(packed, states)
    with pytest.raises(RuntimeError, match=r"^fastrnn: h0 must have size"):
        fastrnn.LSTM(3, 4, dtype=dtype)(packed, [zeros(1, 1, 2, 4, dtype=dtype), states[0][:1]])


# It comes to the states later.
@pytest.mark.parametrize("name", CLASSES)
def test_packed_states_without_a_step(name: str) -> None:
    packed = PackedSequence(zeros(0, 3), torch.tensor([], dtype=torch.int64))
    h0, c0 = zeros(2, 2, 4), zeros(1, 2, 4)
    hx = (h0, c0) if name == "LSTM" else h0
    assert_same_outcome(lambda package, name: getattr(package, name)(3, 4)(packed, hx), name)


def test_packed_states_that_torch_takes() -> None:
    packed = PackedSequence(zeros(5, 3), torch.tensor([2, 2, 1]))
    states = zeros(1, 2, 4), zeros(2, 2, 4)  # more of c0 than it needs
    assert_same_outcome(lambda package, name: getattr(package, name)(3, 4)(packed, states), "LSTM")


@pytest.mark.parametrize(
    "states", [(1, 2), ("h", "c"), (zeros(1, 2, 4), 1), (zeros(()), zeros(()))], ids=str
)
def test_packed_states_of_other_types(states: tuple) -> None:
    packed = PackedSequence(zeros(5, 3), torch.tensor([2, 2, 1]))
    assert_same_outcome(lambda package, name: getattr(package, name)(3, 4)(packed, states), "LSTM")


# Under a mode of torch.dispatch the op is called as torch calls it.
@pytest.mark.parametrize("around", [nullcontext(), Recorder("")], ids=["plain", "mode"])
@pytest.mark.parametrize("name", ["RNN", "RNNCell"])
def test_a_sparse_state(name: str, around: AbstractContextManager) -> None:
    h = zeros(1, 8) if name == "RNN" else zeros(4, 8)
    x = X[:, 0]
    with around:
        assert_same_outcome(
            lambda package, name: getattr(package, name)(5, 8)(x, h.to_sparse()), name
        )


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell"])
def test_a_sparse_input(name: str) -> None:
    x = X[0].to_sparse_csr()
    assert_same_outcome(lambda package, name: getattr(package, name)(5, 8)(x), name)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_a_failure_is_no_refusal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn does not try again what failed on good arguments, for want of memory say."""

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    for kind in ("forward", "recurrent", "cell"):
        monkeypatch.setattr(fastrnn._direct, kind, fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        getattr(fastrnn, name)(5, 8)(X[:, 0])


@pytest.mark.parametrize("lowers", [False, True])
@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("freed", ["x", "h0", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("module", [fastrnn.RNN(5, 8), fastrnn.LSTM(5, 8).double()], ids=str)
def test_memory_that_was_freed(
    module: nn.RNNBase, contiguous: bool, freed: str, size: int, lowers: bool
) -> None:
    """As FSDP frees it, by hand; torch.nn.LSTM reads it. lowers: in autocast."""
    module = copy.deepcopy(module)
    tensors = dict(module.named_parameters())
    dtype = module.weight_hh_l0.dtype
    tensors |= {"x": torch.zeros(4, 3, 5, dtype=dtype), "h0": torch.zeros(1, 3, 8, dtype=dtype)}
    h0 = tensors["h0"]
    if not contiguous:  # in every second element
        tensors[freed].data = torch.stack([tensors[freed].detach()] * 2, -1)[..., 0]
    tensors[freed].untyped_storage().resize_(size)
    raises = pytest.raises(RuntimeError, match="that fastrnn is to read was freed")
    with raises, torch.autocast("cpu", enabled=lowers):
        module(tensors["x"], (h0, torch.zeros_like(h0)) if module.mode == "LSTM" else h0)


@pytest.mark.parametrize("lowers", [False, True])
def test_batch_sizes_whose_memory_was_freed(lowers: bool) -> None:
    data, batch_sizes = nn.utils.rnn.pack_sequence([X[0], X[0]])[:2]
    batch_sizes.untyped_storage().resize_(8)
    module = fastrnn.RNN(5, 8)
    raises = pytest.raises(RuntimeError, match="that fastrnn is to read was freed")
    with raises, torch.autocast("cpu", enabled=lowers):
        torch.ops.fastrnn.recurrent(
            "RNN_TANH",
            data,
            batch_sizes,
            None,
            None,
            module._flat_weights,
            1,
            True,
            False,
            False,
            None,
        )


def test_memory_that_was_freed_before_the_backward_pass() -> None:
    module = fastrnn.LSTM(5, 8)
    y, (h_n, _) = module(torch.zeros(4, 3, 5, requires_grad=True))
    dh_n = torch.ones_like(h_n)
    dh_n.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="was freed"):
        h_n.backward(dh_n, retain_graph=True)
    module.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="was freed"):
        y.sum().backward()
