"""Latency of a call of few steps with the state carried on, as a distribution. See README.md."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench.arguments import positive, seconds
from fastrnn.bench.check import mismatches
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import settle
from fastrnn.bench.work import REFERENCE, SUBJECT, Build, Step, Workload, make_module, make_workload
from report import write_results
from selection import add_out

SIZES = (64, 256, 1024)
QUANTILES = (0.5, 0.9, 0.99)
_BLOCK = 200  # calls of one implementation before the next has its turn, if it does not rest
_RESTED_BLOCK = 10
_WARM_UPS = 20  # at the start of a block, not counted

# Each call of a stepper's run goes on from the state that the last one left.
STEPPERS: dict[str, Build] = {
    REFERENCE: lambda work: step_module(nn, work),
    SUBJECT: lambda work: step_module(fastrnn, work),
}


@dataclass(frozen=True)
class Distribution:
    """Seconds of a step at each of QUANTILES, by implementation."""

    shape: str
    calls: int
    seconds: dict[str, tuple[float, ...]]


def step_module(library: ModuleType, work: Workload) -> Step:
    """A stepper through `library.RNN` or `library.LSTM`."""
    module = make_module(library, work)
    x, output, state = work.x, None, work.hx

    def run() -> None:
        nonlocal output, state
        output, state = module(x, state)

    def results() -> dict[str, Tensor]:
        run()
        states = state if isinstance(state, tuple) else (state,)
        return {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}

    return Step(run, results)


def build_and_check(work: Workload) -> dict[str, Callable[[], Any]]:
    """What to call for a step, by implementation, once all agree on the fourth.

    Raises:
        ArithmeticError: an implementation's results are not the reference's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    runs = {}
    for name, build in STEPPERS.items():
        step = build(work)
        assert step is not None
        for _ in range(3):
            step.run()
        found[name] = step.results()
        if wrong := mismatches(found[name], found[REFERENCE]):
            raise ArithmeticError(f"{work.shape.id} {name}: {'; '.join(wrong)}")
        runs[name] = step.run
    return runs


def measure(shape: Shape, seconds: float, rest: float) -> Distribution:
    """Times calls, in blocks of each implementation in turn, each after `rest` seconds of sleep."""
    times: dict[str, list[int]] = {name: [] for name in STEPPERS}
    with torch.inference_mode():
        runs = build_and_check(make_workload(shape, "inference"))
        deadline = time.perf_counter() + seconds
        gc.disable()
        while time.perf_counter() < deadline:
            for name, step in runs.items():
                settle()
                for _ in range(0 if rest else _WARM_UPS):
                    step()
                for _ in range(_RESTED_BLOCK if rest else _BLOCK):
                    if rest:
                        time.sleep(rest)
                    start = time.perf_counter_ns()
                    step()
                    times[name].append(time.perf_counter_ns() - start)
        gc.enable()
    quantiles = {name: np.quantile(values, QUANTILES) / 1e9 for name, values in times.items()}
    seconds_at = {name: tuple(map(float, values)) for name, values in quantiles.items()}
    return Distribution(shape.id, len(times[SUBJECT]), seconds_at)


def table(found: list[Distribution]) -> str:
    """Microseconds at each quantile, and the ratio to fastrnn's, an implementation a line."""
    quantiles = "".join(f"{f'p{100 * q:g} us':>10}" for q in QUANTILES)
    ratios = "".join(f"{f'p{100 * q:g}':>7}" for q in QUANTILES)
    lines = [f"{'shape':<26}{'implementation':<16}{quantiles}   over {SUBJECT}'s{ratios}"]
    for one in found:
        for name, values in one.seconds.items():
            times = "".join(f"{value * 1e6:>10.1f}" for value in values)
            over = "".join(
                f"{value / base:>7.2f}"
                for value, base in zip(values, one.seconds[SUBJECT], strict=True)
            )
            lines.append(f"{one.shape:<26}{name:<16}{times}   {'':<14}{over}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/latency.py", description="Latency of small calls, batch 1."
    )
    add = parser.add_argument
    add("--threads", type=positive, default=1, help="default 1")
    add("--steps", type=positive, default=1, metavar="T", help="of a call; default 1")
    add("--rest", type=positive, metavar="MS", help="milliseconds of sleep before each call")
    add("--peers", action="store_true", help="ONNX Runtime too")
    add("--seconds", type=seconds, default=4.0, metavar="S", help="per shape; default 4")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    """Measures and prints; writes latency.json."""
    arguments = parse_arguments()
    if arguments.peers and arguments.steps > 1:
        sys.exit("--peers takes one step a call")
    if arguments.peers:
        try:
            from peers import step_with_onnxruntime
        except ImportError as error:
            sys.exit(f"--peers needs more packages: pip install onnx onnxruntime ({error})")
        STEPPERS["onnxruntime"] = step_with_onnxruntime
    torch.set_num_threads(arguments.threads)
    sizes = [f"T{arguments.steps}-I{size}-H{size}-hx" for size in SIZES]
    shapes = [Shape.parse(f"{kind}-B1-{text}") for kind in ("rnn", "lstm") for text in sizes]
    rest = (arguments.rest or 0) / 1e3
    found = [measure(shape, arguments.seconds, rest) for shape in shapes]
    print(table(found))
    write_results(
        arguments.out, "latency", quantiles=QUANTILES, shapes=[asdict(one) for one in found]
    )


if __name__ == "__main__":
    main()
