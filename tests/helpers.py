"""What the tests share: cases, their modules and inputs, and runs of both libraries on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ["LSTM", "RNN_TANH", "RNN_RELU"]
DTYPES = [torch.float32, torch.float64]
HALF_DTYPES = [torch.bfloat16, torch.float16]
FUSED_DTYPES = [*DTYPES, *HALF_DTYPES]

# Without it, as on processors without AVX-512, torch.nn computes bfloat16 LSTMs by small
# operations, and raises under autocast for float32 input.
HAS_ONEDNN_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()

# Largest difference allowed between two right results, as a share of the largest value: they
# sum in another order. About 100 roundings in float32 and float64, 5 in 16 bits.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 2e-14,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
LEAST_SCALE = 1e-2  # values are small differences of larger ones below it


@dataclass(frozen=True)
class Case:
    """One configuration of a module and its input. N None means unbatched, P 0 no projection."""

    kind: str = "LSTM"
    T: int = 7
    N: int | None = 3
    I: int = 5  # noqa: E741
    H: int = 17
    L: int = 1
    D: int = 1
    P: int = 0
    bias: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None  # packed if given; unsorted lengths are welcome
    hx: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """Returns a test id such as LSTM-T7-N3-I5-H17-L2-hx-f64."""
        parts = [self.kind, f"T{self.T}", f"N{self.N}", f"I{self.I}", f"H{self.H}"]
        parts += [f"L{self.L}"] * (self.L > 1) + [f"D{self.D}"] * (self.D > 1)
        parts += [f"P{self.P}"] * (self.P > 0) + ["nobias"] * (not self.bias)
        parts += ["batch_first"] * self.batch_first + ["hx"] * self.hx
        if self.lengths:
            parts.append("packed" + "_".join(map(str, self.lengths)) * (len(self.lengths) < 9))
        parts += [f"dropout{self.dropout}"] * (self.dropout > 0)
        prefix = "bf" if self.dtype == torch.bfloat16 else "f"
        return "-".join([*parts, f"{prefix}{torch.finfo(self.dtype).bits}"])


class Inputs(NamedTuple):
    """A padded input, lengths to pack it by or None, and h0, c0 or None."""

    x: Tensor
    lengths: tuple[int, ...] | None = None
    h0: Tensor | None = None
    c0: Tensor | None = None


def cases(kinds: Iterable[str] = KINDS, **options: list) -> list[Case]:
    """Returns one Case per kind and combination of `options`, projections on LSTM only."""
    found = [Case(kind=kind) for kind in kinds]
    for name, values in options.items():
        found = [replace(case, **{name: value}) for case in found for value in values]
    return [case for case in found if case.kind == "LSTM" or case.P == 0]


# Weights' gradients that are the sums of many blocks of rows (csrc/backward_plan.h), in one chunk
# of the time loop or in many, the last sums incomplete.
MANY_ROWS = [
    *cases(T=[50], N=[400], I=[33], H=[17], dtype=FUSED_DTYPES),
    *cases(T=[1], N=[20_000], I=[33], H=[17], hx=[True]),
    *cases(["LSTM"], T=[30], N=[400], I=[33], H=[17], P=[3], D=[2]),
    *cases(T=[60], N=[300], I=[33], H=[17], lengths=[tuple(60 - n % 40 for n in range(300))]),
]


def build(package: ModuleType, case: Case, seed: int = 0) -> nn.RNNBase:
    """Returns `case`'s module from `package` (fastrnn or torch.nn), initialized under `seed`."""
    torch.manual_seed(seed)
    options = {
        "num_layers": case.L,
        "bias": case.bias,
        "batch_first": case.batch_first,
        "dropout": case.dropout,
        "bidirectional": case.D == 2,
        "dtype": case.dtype,
    }
    if case.kind == "LSTM":
        return package.LSTM(case.I, case.H, proj_size=case.P, **options)
    return package.RNN(case.I, case.H, nonlinearity=case.kind[4:].lower(), **options)


def make_inputs(case: Case, seed: int = 1, scale: float = 1.0) -> Inputs:
    """Returns normal random inputs for `case`, the same numbers at every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (scale * values).to(torch.float32).to(case.dtype)

    batch = [] if case.N is None else [case.N]
    time_batch = [*batch, case.T] if case.batch_first else [case.T, *batch]
    x = draw(*time_batch, case.I)
    if not case.hx:
        return Inputs(x, case.lengths)
    h0 = draw(case.L * case.D, *batch, case.P or case.H)
    c0 = draw(case.L * case.D, *batch, case.H) if case.kind == "LSTM" else None
    return Inputs(x, case.lengths, h0, c0)


def draw_masks(case: Case, x: Tensor) -> Tensor | None:
    """Draws what dropout keeps of layers' outputs, as torch.nn does, as the ops take it."""
    if case.dropout == 0:
        return None
    steps = x.shape[:-1]
    if case.batch_first and x.dim() == 3:
        steps = (steps[1], steps[0])
    ones = torch.ones(*steps, (case.P or case.H) * case.D)
    return torch.stack([F.dropout(ones, case.dropout) != 0 for _ in range(case.L - 1)])


def call(module: nn.RNNBase, inputs: Inputs) -> dict[str, Tensor]:
    """Runs `module`; returns y (a packed sequence's data), h_n and an LSTM's c_n."""
    x, lengths, h0, c0 = inputs
    if lengths is not None:
        x = pack_padded_sequence(x, list(lengths), module.batch_first, enforce_sorted=False)
    hx = h0 if c0 is None else (h0, c0)
    y, hidden = module(x) if hx is None else module(x, hx)
    if lengths is not None:
        assert isinstance(y, PackedSequence)
        assert torch.equal(y.batch_sizes, x.batch_sizes)
        assert torch.equal(y.sorted_indices, x.sorted_indices)
        assert torch.equal(y.unsorted_indices, x.unsorted_indices)
        y = y.data
    states = hidden if module.mode == "LSTM" else (hidden,)
    return {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False))}


def copy_leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Returns a copy of each tensor of `inputs`, by name, for gradients."""
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in inputs._asdict().items()
        if isinstance(value, Tensor)
    }


def run(
    module: nn.RNNBase,
    inputs: Inputs,
    use: Iterable[str] = ("y", "h_n", "c_n"),
    seed: int = 2,
) -> dict[str, Tensor]:
    """Runs `module` forward and backward on copies of `inputs`.

    The loss is a random weighting of the outputs named in `use`; `seed` draws the weighting and
    the dropout masks. Returns the outputs and every gradient, named dx, dh0, dc0, dweight_ih_l0.
    """
    leaves = copy_leaves(inputs)
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = call(module, inputs._replace(**leaves))
    loss(outputs, use, seed).backward()
    results = {name: output.detach() for name, output in outputs.items()}
    leaves |= dict(module.named_parameters())
    results |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return results


def run_weighted(
    module: nn.RNNBase, inputs: Inputs, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns outputs, y padded, and gradients of `inputs`, for the loss sum(output * weight)."""
    leaves = copy_leaves(inputs)
    outputs = call(module, inputs._replace(**leaves))
    if inputs.lengths is not None:
        packed = pack_padded_sequence(
            inputs.x, list(inputs.lengths), module.batch_first, enforce_sorted=False
        )
        y = PackedSequence(outputs["y"], *packed[1:])
        outputs["y"], _ = pad_packed_sequence(y, module.batch_first)
    sum((outputs[name] * weight).sum() for name, weight in weights.items()).backward()
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def random_weights(outputs: dict[str, Tensor], seed: int = 2) -> dict[str, Tensor]:
    """Returns weights for a loss, one for every element of `outputs`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        for name, output in outputs.items()
    }


def loss(outputs: dict[str, Tensor], use: Iterable[str], seed: int = 2) -> Tensor:
    """Returns the sum of the outputs named in `use`, each under a random weighting."""
    weights = random_weights(outputs, seed)
    return sum((outputs[name] * weights[name]).sum() for name in outputs if name in use)


def to_double(module: nn.RNNBase, case: Case) -> nn.RNNBase:
    """Returns torch.nn's float64 module with `module`'s weights."""
    twin = build(nn, replace(case, dtype=torch.float64))
    twin.load_state_dict(module.state_dict())
    return twin.train(module.training)


def assert_same(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    factor: float = 1,
    least_scale: float = LEAST_SCALE,
) -> None:
    """Asserts that two runs agree to the rounding of their dtype, times `factor`."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        finite = want[want.isfinite()]
        scale = max(least_scale, finite.abs().max().item()) if finite.numel() else least_scale
        atol = factor * scale * TOLERANCE[want.dtype]
        torch.testing.assert_close(
            got, want, rtol=0, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
        if name in ("y", "h_n", "c_n") and want.is_contiguous():
            assert got.is_contiguous(), f"{name} is not contiguous"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts that two runs agree bit for bit, so not where one has 0 and one -0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        bits, bits_wanted = (
            t.contiguous().view(integers[want.dtype.itemsize]) for t in (got, want)
        )
        differ = bits != bits_wanted
        assert not differ.any(), (
            f"{name}: {int(differ.sum())} of {differ.numel()} values differ, the first at "
            f"{differ.nonzero()[0].tolist()}: {got[differ][0].item()!r}, {want[differ][0].item()!r}"
        )


def takes_fused_path(function: Callable[[], object]) -> bool:
    """Returns whether `function` calls one of fastrnn's ops."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    ops = ("fastrnn::recurrent", "fastrnn::cell")
    return any(event.name.startswith(ops) for event in profile.events())


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of the op named `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.calls: list[tuple[tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() == self.name:
            self.calls.append((args, kwargs))
        return func(*args, **kwargs)


def run_python(*args: str, cwd: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a fresh Python interpreter with `env` set; an empty value unsets a variable."""
    process = subprocess.Popen(
        [sys.executable, *args],
        cwd=cwd,
        env={name: value for name, value in (os.environ | env).items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        # Long beside what a slow machine needs for the longest, so that it stops only what hangs.
        stdout, stderr = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        # Its children too: they hold the pipes.
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        stderr += "\nkilled: it hung"
    # torch's, where it is a build with CUDA and there is a toolkit, but no GPU.
    lines = stderr.splitlines(keepends=True)
    stderr = "".join(line for line in lines if "No CUDA runtime is found" not in line)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_tests(*args: str, **env: str) -> None:
    """Runs pytest on tests of this folder in a fresh interpreter, with `env` set."""
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    result = run_python("-m", "pytest", *options, *args, cwd=str(Path(__file__).parent), **env)
    assert result.returncode == 0, result.stdout + result.stderr
