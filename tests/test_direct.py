"""The short way into the ops: plain calls take it, and all others go through torch.ops."""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

import fastrnn
from fastrnn import _direct, _fused
from helpers import FUSED_DTYPES, Recorder

MODULES = {
    "LSTM": lambda: fastrnn.LSTM(5, 8, 2, bidirectional=True, proj_size=3),
    "RNN": lambda: fastrnn.RNN(5, 8, nonlinearity="relu", bias=False),
    "LSTMCell": lambda: fastrnn.LSTMCell(5, 8),
    "RNNCell": lambda: fastrnn.RNNCell(5, 8, bias=False),
}


KINDS = ("forward", "recurrent", "cell")


def make_input(module: nn.Module) -> Tensor:
    """Returns three rows, in sequences of four steps where the module takes sequences."""
    rows = (3,) if isinstance(module, nn.RNNCellBase) else (4, 3)
    return torch.randn(*rows, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call since took the short way."""
    taken: list[bool] = []

    def watch(name: str) -> Callable[..., Any]:
        function = getattr(_direct, name)

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            if name == "recurrent":  # what is not plain to forward may be to this
                taken.pop()
            taken.append(result is not NotImplemented)
            return result

        return call

    for name in KINDS:
        monkeypatch.setattr(_direct, name, watch(name))
    return taken


def first(result: Any) -> Tensor:
    """Returns the first tensor of a module's result."""
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_plain_calls(name: str, dtype: torch.dtype, mode: Any, ways: list[bool]) -> None:
    module = MODULES[name]().to(dtype)
    x = make_input(module).to(dtype)
    with mode():
        result = module(x)
        assert ways == [True]
        state = result[1] if name in ("LSTM", "RNN") else result
        for given in (state, list(state)) if isinstance(state, tuple) else (state,):
            module(x, given)
            assert ways.pop()
    assert ways == [True]
    if mode is nullcontext:
        first(result).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_packed_calls(ways: list[bool]) -> None:
    module = fastrnn.LSTM(5, 8)
    x = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    module(x)
    assert ways == [True]


class AddsNothing(TorchFunctionMode):
    """Sees every call of torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Another class of tensor, which has a say in every call."""


def with_dispatch_mode(module: nn.Module, x: Tensor) -> Tensor:
    kind = "cell" if isinstance(module, nn.RNNCellBase) else "recurrent"
    with torch.no_grad(), Recorder(f"fastrnn::{kind}") as recorder:
        y = first(module(x))
    assert len(recorder.calls) == 1
    return y


def with_function_mode(module: nn.Module, x: Tensor) -> Tensor:
    with AddsNothing() as mode:
        y = first(module(x))
    kind = "cell" if isinstance(module, nn.RNNCellBase) else "recurrent"
    assert getattr(torch.ops.fastrnn, kind).default in mode.seen
    return y


def with_vmap_over_weights(module: nn.Module, x: Tensor) -> Tensor:
    name, weight = next(module.named_parameters())
    called = torch.vmap(lambda w: first(functional_call(module, {name: w}, (x,))))
    return called(weight.unsqueeze(0)).squeeze(0)


def with_grad(module: nn.Module, x: Tensor) -> Tensor:
    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        y = first(module(x))
        return y.sum(), y

    return torch.func.grad(loss, has_aux=True)(x)[1]


def with_forward_mode(module: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y, tangent = forward_ad.unpack_dual(first(module(dual)))
    assert tangent is not None
    return y


def with_subclass(module: nn.Module, x: Tensor) -> Tensor:
    y = first(module(x.as_subclass(Subclass)))
    assert type(y) is Subclass
    return y.as_subclass(Tensor)


def with_subclass_of_weights(module: nn.Module, x: Tensor) -> Tensor:
    weights = {name: p.data.as_subclass(Subclass) for name, p in module.named_parameters()}
    module.requires_grad_(False)
    for name, weight in weights.items():
        module._parameters[name] = weight
    return first(module(x)).as_subclass(Tensor)


def with_weight_norm(module: nn.Module, x: Tensor) -> Tensor:
    name = next(name for name, _ in module.named_parameters())
    return first(parametrizations.weight_norm(module, name)(x))


def with_pruning(module: nn.Module, x: Tensor) -> Tensor:
    name = next(name for name, _ in module.named_parameters())
    return first(prune.identity(module, name)(x))


@pytest.mark.parametrize("name", MODULES)
def test_vmap_over_inputs(name: str, ways: list[bool]) -> None:
    module = MODULES[name]()
    x = make_input(module)
    expected = first(module(x))
    result = torch.vmap(lambda row: first(module(row)), in_dims=-2, out_dims=-2)(x)
    assert ways == [True, True]
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


CONTEXTS = [
    with_dispatch_mode,
    with_function_mode,
    with_vmap_over_weights,
    with_grad,
    with_forward_mode,
    with_subclass,
    with_subclass_of_weights,
    with_weight_norm,
    with_pruning,
]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", MODULES)
def test_other_calls(name: str, context: Any, ways: list[bool]) -> None:
    module = MODULES[name]()
    x = make_input(module)
    expected = first(module(x))
    ways.clear()
    y = context(module, x)
    assert ways and not any(ways)
    tolerance = 1e-6 if context is with_weight_norm else 0.0  # which computes the weight anew
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str, ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Short or long, the way leads to autocast's kernel."""
    module = MODULES[name]()
    x = make_input(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = first(module(x))
        for kind in KINDS:
            monkeypatch.setattr(_direct, kind, lambda *_: NotImplemented)
        expected = first(module(x))
    assert ways == [True]
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert not torch.equal(y, first(module(x)))


@pytest.mark.parametrize("name", MODULES)
def test_fakes_and_traces(name: str, ways: list[bool]) -> None:
    module = MODULES[name]()
    x = make_input(module)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = first(module(mode.from_tensor(x)))
    assert ways == [False]
    assert type(y) is not Tensor
    traced = torch.jit.trace(module, x, check_trace=False)
    assert ways == [False, False]
    assert torch.equal(first(traced(x * 2)), first(module(x * 2)))


WEIGHTS = {"w": torch.zeros(8, 5), "u": torch.zeros(8, 8), "none": None}
ATTRIBUTES = {
    "mode": "RNN_TANH",
    "_parameters": WEIGHTS,
    "_flat_weights_names": ["w", "u"],
    "num_layers": 1,
    "bias": False,
    "bidirectional": False,
    "batch_first": False,
    "training": False,
    "dropout": 0.0,
}
GOOD = {
    "forward": [ATTRIBUTES, torch.zeros(2, 3, 5), torch.zeros(1, 3, 8)],
    "recurrent": [ATTRIBUTES, torch.zeros(2, 3, 5), None, torch.zeros(1, 3, 8), None, None, 0.0],
    "cell": ["RNN_TANH", torch.zeros(3, 5), torch.zeros(3, 8), None, WEIGHTS, ["w", "u"], False],
}
STRANGE = [b"RNN_TANH", object(), 3, 1.5, [], {}, ["w", "none"], ["w", "missing"], 1 << 70]
STRANGE += [torch.zeros(3, 5).as_subclass(Subclass), torch.zeros(2, 3, 5).to_sparse(), "\ud800"]


@pytest.mark.parametrize("name", GOOD)
def test_arguments_of_other_types(name: str) -> None:
    """None of them is read as what it is not."""
    function, good = getattr(_direct, name), GOOD[name]
    assert isinstance(function(*good), tuple)
    refused = 0
    for i in range(len(good)):
        assert function(*good[:i]) is NotImplemented
        for strange in STRANGE:
            if type(strange) is type(good[i]) and type(strange) is float:
                continue
            refused += is_refused(function, [*good[:i], strange, *good[i + 1 :]])
    assert function(*good, 1) is NotImplemented
    assert refused > 9 * len(good)


def is_refused(function: Callable[..., Any], arguments: list[Any]) -> bool:
    """Whether `function` leaves these to torch.ops; what it does not, it does or the op refuses."""
    try:
        return function(*arguments) is NotImplemented
    except NotImplementedError as error:  # torch's own, where no backend has the op
        assert any(type(a) is Tensor and a.layout is torch.sparse_coo for a in arguments), error
    except RuntimeError as error:  # the op's own, on what is of the right type
        assert str(error).startswith("fastrnn: "), error
    return False


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("name", ["forward", "recurrent"])
def test_attributes_of_other_types(name: str, attribute: str) -> None:
    function, arguments = getattr(_direct, name), GOOD[name][1:]
    refused = 0
    for strange in STRANGE:
        refused += is_refused(function, [ATTRIBUTES | {attribute: strange}, *arguments])
    assert refused > len(STRANGE) - 4
    lacking = {key: value for key, value in ATTRIBUTES.items() if key != attribute}
    assert function(lacking, *arguments) is NotImplemented


@pytest.mark.parametrize("strange", [(), [None, None], (torch.zeros(1, 3, 8),), 3, {}, "ab"])
def test_states_that_are_not_two(strange: Any) -> None:
    weights = {"w": torch.zeros(32, 5), "u": torch.zeros(32, 8)}
    lstm = ATTRIBUTES | {"mode": "LSTM", "_parameters": weights}
    x, state = GOOD["forward"][1:]
    assert _direct.forward(lstm, x, [state, state]) is not NotImplemented
    assert _direct.forward(lstm, x, strange) is NotImplemented


@pytest.mark.parametrize("name", GOOD)
def test_errors_are_those_of_the_op(name: str) -> None:
    arguments = list(GOOD[name])
    arguments[1] = torch.zeros(*arguments[1].shape[:-1], 6)
    with pytest.raises(RuntimeError, match="fastrnn: ") as direct:
        getattr(_direct, name)(*arguments)
    if name == "cell":
        mode, x, h0, c0, _, _, has_biases = arguments
        layers: list[Any] = [has_biases]
    else:
        (x, h0), c0 = (arguments[1], GOOD["forward"][2]), None
        mode, layers = "RNN_TANH", [1, False, False, False]
    op = getattr(torch.ops.fastrnn, "cell" if name == "cell" else "recurrent")
    states = [h0, c0] if name == "cell" else [None, h0, c0]
    with pytest.raises(RuntimeError) as of_op:
        op(mode, x, *states, [WEIGHTS["w"], WEIGHTS["u"]], *layers)
    assert str(direct.value) == str(of_op.value)


@pytest.mark.parametrize("major", [7, 8])
def test_gpus_that_are_too_old_are_left_to_torch(
    major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the op is called: in compiled code its refusal would come too late."""
    monkeypatch.setattr(_fused, "HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode():
        assert _fused.can_fuse(torch.empty(4, 3, 5, device="cuda")) == (major >= 8)
        assert _fused.can_fuse(torch.empty(4, 3, 5, device="cuda:1"))  # of a graph for elsewhere


def test_devices_without_kernels_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused, "HAS_CUDA", False)
    assert not _fused.can_fuse(torch.empty(4, 3, 5, device="meta"))
    with FakeTensorMode():
        assert not _fused.can_fuse(torch.empty(4, 3, 5, device="cuda"))


@pytest.mark.usefixtures("fresh_compiler")
def test_compilers_learn_whether_a_gpu_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is asked in functions of torch's that they cannot trace."""
    monkeypatch.setattr(_fused, "HAS_CUDA", True)
    with FakeTensorMode():
        x = torch.empty(4, 3, 5, device="cuda")
        assert torch.compile(_fused.can_fuse, fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize("name", MODULES)
def test_results_are_freed(name: str) -> None:
    module = MODULES[name]()
    with torch.no_grad():
        y = first(module(make_input(module)))
    alive = weakref.ref(y)
    del y
    assert alive() is None


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_other_python_threads_run_meanwhile(name: str) -> None:
    module = getattr(fastrnn, name)(512, 512).requires_grad_(False)
    x = torch.randn(*((4096,) if name == "LSTMCell" else (60, 64)), 512)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(1e-4)

    ticking = threading.Thread(target=tick)
    ticking.start()
    module(x)
    begin = time.monotonic()
    module(x)
    end = time.monotonic()
    done.set()
    ticking.join()
    quarter = (end - begin) / 4
    assert any(begin + quarter < t < end - quarter for t in ticks)
