"""What is timed: a module of one library on the same weights and inputs as the others'."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn.bench.shapes import Shape

SUBJECT = "fastrnn"  # the implementation that the others are divided by
REFERENCE = "torch"  # the one whose results the others must reproduce


@dataclass(frozen=True)
class Workload:
    """The same work for every implementation: a shape, a mode, the weights and the inputs.

    Attributes:
        mode: "inference" or "training".
        arguments: Keyword arguments of the torch.nn constructor.
        state: The weights, as torch.nn's state_dict.
        x: Input as the module takes it: (T, N, I), (N, T, I) or a PackedSequence.
        hx: Initial state, or None.
        gradient: Gradient of the output (of its `data` if packed); training only.
        device: Where x, hx and gradient are, and the module must be.
    """

    shape: Shape
    mode: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    x: Tensor | PackedSequence
    hx: Any
    gradient: Tensor | None
    device: str = "cpu"


@dataclass(frozen=True)
class Step:
    """What an implementation's build function returns.

    Attributes:
        run: Does the work once: this is what is timed.
        results: Does it once and names its results as torch.nn would shape them: "output", "h_n",
            "c_n", and in training "x.grad" and one "<weight>.grad" each.
        clear: Lets go of what a call leaves behind: gradients.
        own_threads: Whether it keeps threads of its own beside torch's.
    """

    run: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]]
    clear: Callable[[], None] = lambda: None
    own_threads: bool = False


Build = Callable[[Workload], "Step | None"]


def make_workload(shape: Shape, mode: str, device: str = "cpu", seed: int = 0) -> Workload:
    """Draws weights and inputs for a shape, by a seed the same at each call and on each device."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "input_size": shape.I,
        "hidden_size": shape.H,
        "num_layers": shape.L,
        "bidirectional": shape.D == 2,
        "batch_first": shape.batch_first,
        "dtype": shape.dtype,
    }
    if shape.kind == "rnn":
        arguments["nonlinearity"] = shape.nonlinearity
    else:
        arguments["proj_size"] = shape.P
    state = getattr(nn, shape.kind.upper())(**arguments).state_dict()

    leading: tuple[int, ...] = (shape.N, shape.T) if shape.batch_first else (shape.T, shape.N)
    padded = torch.randn(*leading, shape.I).to(device, shape.dtype)
    x: Tensor | PackedSequence = padded
    if shape.fill < 100:
        lengths = torch.tensor(shape.lengths)
        x = pack_padded_sequence(padded, lengths, shape.batch_first, enforce_sorted=False)
        leading = (shape.steps,)

    hx: Any = None
    if shape.hx:
        hx = torch.randn(shape.L * shape.D, shape.N, shape.out).to(device, shape.dtype)
        if shape.kind == "lstm":
            hx = (hx, torch.randn(shape.L * shape.D, shape.N, shape.H).to(device, shape.dtype))
    gradient = None
    if mode == "training":
        gradient = torch.randn(*leading, shape.D * shape.out).to(device, shape.dtype)
    return Workload(shape, mode, arguments, state, x, hx, gradient, device)


def _data(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def make_module(library: ModuleType, work: Workload) -> nn.Module:
    """`library.RNN` or `library.LSTM`, which mean what torch.nn's mean, with the weights."""
    module: nn.Module = getattr(library, work.shape.kind.upper())(**work.arguments)
    module.load_state_dict(work.state)
    return module.train(work.mode == "training").to(work.device)


def build_from_modules(
    library: ModuleType, work: Workload, wrap: Callable[[nn.Module], Any] = lambda module: module
) -> Step:
    """A step through the module of `library`, or through what wrap makes of it."""
    module = make_module(library, work)
    call = wrap(module)
    training = work.mode == "training"
    leaf = _data(work.x).clone().requires_grad_(training)
    x = work.x._replace(data=leaf) if isinstance(work.x, PackedSequence) else leaf
    hx, gradient = work.hx, work.gradient
    leaves = {"x": leaf, **dict(module.named_parameters())}
    tensors = list(leaves.values())

    def infer() -> Any:
        return call(x, hx)

    def clear() -> None:
        for tensor in tensors:
            tensor.grad = None

    def train() -> Any:
        clear()
        output, states = call(x, hx)
        _data(output).backward(gradient)
        return output, states

    run = train if training else infer

    def results() -> dict[str, Tensor]:
        output, states = run()
        states = states if isinstance(states, tuple) else (states,)
        named = {"output": _data(output), **dict(zip(("h_n", "c_n"), states, strict=False))}
        if training:
            for name, tensor in leaves.items():
                if tensor.grad is None:
                    raise RuntimeError(f"no gradient reached {name}")
                named[f"{name}.grad"] = tensor.grad
        return {name: tensor.detach() for name, tensor in named.items()}

    return Step(run, results, clear)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupts what runs inside after that time; main thread only.

    What runs inside may swallow the interrupt, as Python itself does in a destructor or a callback:
    it comes again every second, and what ends too late fails all the same.

    Raises:
        TimeoutError: the time was up.
    """
    message = f"not done after {seconds:g} s"
    expired = done = False

    def interrupt(*_: object) -> None:
        nonlocal expired
        expired = True
        if not done:
            raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    except Exception as error:
        done = True
        if expired and not isinstance(error, TimeoutError):
            raise TimeoutError(message) from error
        raise
    finally:
        done = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if expired:
        raise TimeoutError(message)


def build_compiled(work: Workload, seconds: float) -> Step:
    """A step through torch.nn's module under torch.compile, as one graph; compiled here.

    By itself torch.compile leaves nn.RNN and nn.LSTM as they are; `allow_rnn` is its experimental
    setting that takes them in. It unrolls the steps where torch has no one operation for them, so
    that compiling may take longer than anyone would wait: hence a limit.

    Raises:
        Exception: whatever torch.compile does; TimeoutError after that many seconds.
    """
    from torch import _dynamo  # takes seconds to import, and the rest needs none of it

    _dynamo.reset()  # forgets what was compiled for another number of threads
    step = build_from_modules(nn, work, lambda module: torch.compile(module, fullgraph=True))
    with time_limit(seconds), _dynamo.config.patch(allow_rnn=True):
        step.results()
    return step


MODULES: dict[str, Build] = {
    REFERENCE: lambda work: build_from_modules(nn, work),
    SUBJECT: lambda work: build_from_modules(fastrnn, work),
}
