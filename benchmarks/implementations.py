"""What is timed. To add a column, register a build function under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from cells import Cell

SUBJECT = "fastrnn"  # the implementation that the others are divided by
REFERENCE = "torch"  # the one whose results the others must reproduce


@dataclass(frozen=True)
class Workload:
    """The same work for every implementation: a cell, a mode, the weights and the inputs.

    Attributes:
        mode: "inference" or "training".
        arguments: Keyword arguments of the torch.nn constructor.
        state: The weights, as torch.nn's state_dict.
        x: Input as the module takes it: (T, N, I), (N, T, I) or a PackedSequence.
        hx: Initial state, or None.
        gradient: Gradient of the output (of its `data` if packed); training only.
    """

    cell: Cell
    mode: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]
    x: Tensor | PackedSequence
    hx: Any
    gradient: Tensor | None


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


def make_workload(cell: Cell, mode: str) -> Workload:
    """Draws weights and inputs for a cell, the same ones at each call."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "input_size": cell.I,
        "hidden_size": cell.H,
        "num_layers": cell.L,
        "bidirectional": cell.D == 2,
        "batch_first": cell.batch_first,
        "dtype": cell.dtype,
    }
    if cell.kind == "rnn":
        arguments["nonlinearity"] = cell.nonlinearity
    else:
        arguments["proj_size"] = cell.P
    state = getattr(nn, cell.kind.upper())(**arguments).state_dict()

    leading: tuple[int, ...] = (cell.N, cell.T) if cell.batch_first else (cell.T, cell.N)
    padded = torch.randn(*leading, cell.I).to(cell.dtype)
    x: Tensor | PackedSequence = padded
    if cell.fill < 100:
        lengths = torch.tensor(cell.lengths)
        x = pack_padded_sequence(padded, lengths, cell.batch_first, enforce_sorted=False)
        leading = (cell.steps,)

    hx: Any = None
    if cell.hx:
        hx = torch.randn(cell.L * cell.D, cell.N, cell.out).to(cell.dtype)
        if cell.kind == "lstm":
            hx = (hx, torch.randn(cell.L * cell.D, cell.N, cell.H).to(cell.dtype))
    gradient = None
    if mode == "training":
        gradient = torch.randn(*leading, cell.D * cell.out).to(cell.dtype)
    return Workload(cell, mode, arguments, state, x, hx, gradient)


def _data(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def make_module(library: ModuleType, work: Workload) -> nn.Module:
    """`library.RNN` or `library.LSTM`, which mean what torch.nn's mean, with the weights."""
    module: nn.Module = getattr(library, work.cell.kind.upper())(**work.arguments)
    module.load_state_dict(work.state)
    return module.train(work.mode == "training")


def build_from_modules(library: ModuleType, work: Workload) -> Step:
    """A step through the module of `library`."""
    module = make_module(library, work)
    training = work.mode == "training"
    leaf = _data(work.x).clone().requires_grad_(training)
    x = work.x._replace(data=leaf) if isinstance(work.x, PackedSequence) else leaf
    hx, gradient = work.hx, work.gradient
    leaves = {"x": leaf, **dict(module.named_parameters())}
    tensors = list(leaves.values())

    def infer() -> Any:
        return module(x, hx)

    def clear() -> None:
        for tensor in tensors:
            tensor.grad = None

    def train() -> Any:
        clear()
        output, states = module(x, hx)
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


# Name and build function of each column, in the order of the table. A build function returns None
# for a workload it does not do (a peer that cannot train, say): its column then stays empty.
IMPLEMENTATIONS: dict[str, Build] = {
    REFERENCE: lambda work: build_from_modules(nn, work),
    SUBJECT: lambda work: build_from_modules(fastrnn, work),
}
