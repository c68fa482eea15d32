"""torch.func's transforms of modules against Python loops over the samples. See README.md."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import fastrnn
from fastrnn.bench.arguments import positive, seconds
from fastrnn.bench.check import mismatches
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import Spread, alternate, cpu_timer, ratio
from fastrnn.bench.work import REFERENCE, SUBJECT, make_module, make_workload
from report import write_results
from selection import add_out

SHAPES = (
    "rnn-B1-T10-I8-H8",
    "lstm-B1-T10-I8-H8",
    "lstm-B1-T1-I64-H64",
    "lstm-B1-T20-I64-H64",
    "rnn-B1-T20-I256-H256",
    "lstm-B1-T20-I256-H256",
    "lstm-B1-T100-I128-H128-L2",
)

Weights = dict[str, Tensor]
Loop = Callable[[], list[list[Tensor]]]  # results of each sample
Call = Callable[[], list[Tensor]]  # results of all samples


@dataclass(frozen=True)
class Samples:
    """The same work for every implementation: each sample has an input and a model of its own.

    `models` are those of one library, `x` is (samples, T, N, I).
    """

    models: list[nn.Module]
    x: Tensor


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What is computed of one sample."""
    y: Tensor = model(x)[0]
    return y


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a loss by the weights, as autograd gives them."""
    return list(torch.autograd.grad(outputs(model, x).square().sum(), list(model.parameters())))


def functional_gradients(model: nn.Module, weights: Weights, x: Tensor) -> list[Tensor]:
    """The same, as torch.func gives them."""

    def loss(weights: Weights) -> Tensor:
        y: Tensor = functional_call(model, weights, (x,))[0]
        return y.square().sum()

    return list(grad(loss)(weights).values())


def loop_over_inputs(work: Samples) -> Loop:
    """Calls of one model."""
    return lambda: [[outputs(work.models[0], x)] for x in work.x]


def vmap_over_inputs(work: Samples) -> Call:
    """One call of it under vmap."""
    return lambda: [vmap(lambda x: outputs(work.models[0], x))(work.x)]


def loop_of_gradients(work: Samples) -> Loop:
    """The gradients of one model, sample by sample."""
    return lambda: [gradients(work.models[0], x) for x in work.x]


def vmap_of_gradients(work: Samples) -> Call:
    """The same under vmap."""
    model = work.models[0]
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    call = vmap(lambda x: functional_gradients(model, weights, x))
    return lambda: call(work.x)


def loop_over_models(work: Samples) -> Loop:
    """The gradients of each model."""
    return lambda: [gradients(model, x) for model, x in zip(work.models, work.x, strict=True)]


def vmap_over_models(work: Samples) -> Call:
    """The same under vmap, of stacked weights."""
    weights = {n: w.detach() for n, w in stack_module_state(work.models)[0].items()}
    call = vmap(lambda weights, x: functional_gradients(work.models[0], weights, x))
    return lambda: call(weights, work.x)


@dataclass(frozen=True)
class Transform:
    """A transform, and the loop that takes its place; `trains` if gradients are recorded."""

    loop: Callable[[Samples], Loop]
    vmap: Callable[[Samples], Call]
    trains: bool


TRANSFORMS = {
    "inputs": Transform(loop_over_inputs, vmap_over_inputs, trains=False),
    "per-sample": Transform(loop_of_gradients, vmap_of_gradients, trains=True),
    "ensemble": Transform(loop_over_models, vmap_over_models, trains=True),
}
LOOP, VMAPPED = f"{SUBJECT} loop", f"{REFERENCE} vmap"
# Against what the transform of fastrnn's module is timed.
BASELINES = (f"{REFERENCE} loop", LOOP, VMAPPED)


@dataclass(frozen=True)
class Row:
    """Seconds of a call, and time over that of fastrnn's transform, by implementation."""

    transform: str
    shape: str
    samples: int
    threads: int
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]


def draw(library: ModuleType, shape: Shape, count: int) -> Samples:
    """The same inputs and weights for each library."""
    models = [
        make_module(library, make_workload(shape, "inference", seed=seed)) for seed in range(count)
    ]
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, shape.T, shape.N, shape.I, generator=generator)
    return Samples(models, x.to(shape.dtype))


def build(transform: Transform, shape: Shape, count: int) -> dict[str, Loop | Call]:
    """What is timed; without torch.nn's module under vmap where torch refuses that."""
    ours, theirs = draw(fastrnn, shape, count), draw(nn, shape, count)
    calls: dict[str, Loop | Call] = {
        SUBJECT: transform.vmap(ours),
        BASELINES[0]: transform.loop(theirs),
        LOOP: transform.loop(ours),
        VMAPPED: transform.vmap(theirs),
    }
    try:
        calls[VMAPPED]()
    except RuntimeError:  # "Batching rule not implemented for aten::lstm.input", say
        del calls[VMAPPED]
    return calls


def results_of(call: Loop | Call) -> dict[str, Tensor]:
    """The results of all samples, a loop's stacked."""
    results: list[Any] = call()
    if isinstance(results[0], list):
        results = [torch.stack(column) for column in zip(*results, strict=True)]
    return {str(i): result for i, result in enumerate(results)}


def measure(name: str, shape: Shape, count: int, threads: int, seconds: float) -> Row:
    """Checks and times one transform of one shape.

    Raises:
        ArithmeticError: an implementation's results are not those of torch.nn in a loop.
    """
    torch.set_num_threads(threads)
    transform = TRANSFORMS[name]
    with torch.inference_mode(not transform.trains):
        calls = build(transform, shape, count)
        expected = results_of(calls[BASELINES[0]])
        for implementation, call in calls.items():
            if wrong := mismatches(results_of(call), expected):
                raise ArithmeticError(f"{name} {shape.id} {implementation}: {'; '.join(wrong)}")
        timers = {each: cpu_timer(call, threads) for each, call in calls.items()}
        times = alternate(timers, seconds)
    return Row(
        name,
        shape.id,
        count,
        threads,
        {each: Spread.of(values) for each, values in times.items()},
        {each: ratio(times[each], times[SUBJECT]) for each in BASELINES if each in times},
    )


def header() -> str:
    """The first line of the table."""
    ratios = "".join(f"{each:>14}" for each in BASELINES)
    return f"{'transform':<12}{'shape':<28}{'samples':>8}{'threads':>8}{'us':>10}{ratios}"


def line(row: Row) -> str:
    """One row under the header."""
    ratios = (f"{row.ratios[b].median:.2f}" if b in row.ratios else "raises" for b in BASELINES)
    return (
        f"{row.transform:<12}{row.shape:<28}{row.samples:>8}{row.threads:>8}"
        f"{row.seconds[SUBJECT].median * 1e6:>10.0f}{''.join(f'{each:>14}' for each in ratios)}"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/transforms.py", description="Transforms of torch.func against loops."
    )
    add = parser.add_argument
    add("--shape", action="append", type=Shape.parse, metavar="ID", help="any; default a few")
    add("--transform", action="append", choices=TRANSFORMS, help="default: all")
    add("--samples", type=positive, default=32, help="default 32")
    add("--threads", type=positive, default=1, help="default 1")
    add("--seconds", type=seconds, default=1.0, metavar="S", help="per row; default 1")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    """Measures and prints; writes transforms.json."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
    print(f"time over that of {SUBJECT}'s module under the transform\n{header()}")
    rows = []
    for name in arguments.transform or TRANSFORMS:
        for shape in arguments.shape or map(Shape.parse, SHAPES):
            count, threads = arguments.samples, arguments.threads
            rows.append(measure(name, shape, count, threads, arguments.seconds))
            print(line(rows[-1]), flush=True)
    write_results(arguments.out, "transforms", rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
