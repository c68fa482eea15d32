"""Throughput where cores are wanted by others, fastrnn against torch.nn. See README.md.

busy: every core also runs another process that never rests.
callers: eight Python threads call at once, each with two intra-op threads.
servers: sixteen Python threads call one module at once, in inference, each with one intra-op thread
and one sequence.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastrnn.bench.arguments import seconds
from fastrnn.bench.measure import MODES
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import Spread, ratio
from fastrnn.bench.work import REFERENCE, SUBJECT, make_workload
from implementations import IMPLEMENTATIONS
from report import geomean, write_results
from selection import add_out, shape_id

SHAPES = tuple(
    f"{kind}-{sizes}"
    for kind in ("rnn", "lstm")
    for sizes in ("B1-T100-I64-H64", "B1-T50-I256-H256", "B8-T50-I128-H128", "B32-T20-I128-H128")
)
SERVED = tuple(
    f"{kind}-{sizes}"
    for kind in ("rnn", "lstm")
    for sizes in ("B1-T1-I64-H64", "B1-T20-I64-H64", "B1-T100-I64-H64", "B1-T50-I256-H256")
)
CALLERS = {"busy": 1, "callers": 8, "servers": 16}  # Python threads that call, by scenario
INTRA_OP_THREADS = {"busy": 2, "callers": 2, "servers": 1}
_ROUNDS = 7


@dataclass(frozen=True)
class Throughput:
    """Calls a second of all callers together, by implementation, and fastrnn's over torch's."""

    scenario: str
    shape: str
    mode: str
    calls_per_second: dict[str, float]
    ratio: Spread


@contextmanager
def every_core_busy() -> Iterator[None]:
    """Keeps each core busy with a process of its own."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _count_calls(
    runs: list[Callable[[], Any]], inference: bool, seconds: float, intra_op_threads: int
) -> float:
    """Calls a second of all runs, each called over and over by a Python thread of its own."""
    ready = threading.Barrier(len(runs) + 1)
    deadline = 0.0
    calls: list[int] = []

    def call(run: Callable[[], Any]) -> None:
        torch.set_num_threads(intra_op_threads)
        with torch.inference_mode(inference):
            try:
                run()
            except BaseException:
                ready.abort()  # nobody waits for this one
                raise
            ready.wait()
            ready.wait()
            count = 0
            while count == 0 or time.perf_counter() < deadline:
                run()
                count += 1
        calls.append(count)

    threads = [threading.Thread(target=call, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    deadline = start + seconds
    ready.wait()
    for thread in threads:
        thread.join()
    return sum(calls) / (time.perf_counter() - start)


def measure(scenario: str, shape: Shape, mode: str, seconds: float) -> Throughput:
    """Counts calls of each implementation in alternating rounds."""
    inference = mode == "inference"
    callers, threads = CALLERS[scenario], INTRA_OP_THREADS[scenario]
    torch.set_num_threads(threads)
    with torch.inference_mode(inference):
        work = make_workload(shape, mode)
        runs = {
            name: [step.run for _ in range(callers) if (step := build(work))]
            for name, build in IMPLEMENTATIONS.items()
        }
    if scenario == "servers":
        runs = {name: own[:1] * callers for name, own in runs.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    slice_seconds = seconds / (_ROUNDS * len(runs))
    with every_core_busy() if scenario == "busy" else nullcontext():
        for index in range(_ROUNDS):
            for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
                rates[name].append(_count_calls(runs[name], inference, slice_seconds, threads))
    medians = {name: Spread.of(values).median for name, values in rates.items()}
    gain = ratio(rates[SUBJECT], rates[REFERENCE])
    return Throughput(scenario, shape.id, mode, medians, gain)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/load.py", description="Throughput on a machine without an idle core."
    )
    add = parser.add_argument
    add("--shape", action="append", type=shape_id, metavar="ID", help="only this id")
    add("--scenario", choices=tuple(CALLERS), action="append", help="default all")
    add("--seconds", type=seconds, default=5.0, metavar="S", help="per row; default 5")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    """Measures and prints; writes load.json."""
    arguments = parse_arguments()
    found: list[Throughput] = []
    columns = "".join(f"{f'{name}/s':>12}" for name in IMPLEMENTATIONS)
    print(f"{'scenario':<10}{'shape':<26}{'mode':<10}{columns}{'ratio':>8}  q1..q3")
    for scenario in arguments.scenario or CALLERS:
        served = scenario == "servers"
        shapes = arguments.shape or [Shape.parse(text) for text in (SERVED if served else SHAPES)]
        for mode in ("inference",) if served else MODES:
            for shape in shapes:
                one = measure(scenario, shape, mode, arguments.seconds)
                found.append(one)
                rates = "".join(f"{rate:>12,.0f}" for rate in one.calls_per_second.values())
                print(
                    f"{scenario:<10}{shape.id:<26}{mode:<10}{rates}{one.ratio.median:>8.2f}"
                    f"  {one.ratio.q1:.2f}..{one.ratio.q3:.2f}",
                    flush=True,
                )
    worst = min(found, key=lambda one: one.ratio.median)
    print(
        f"\ncalls a second, {SUBJECT} over {REFERENCE}: geomean "
        f"{geomean(one.ratio.median for one in found):.2f}, worst {worst.ratio.median:.2f} "
        f"({worst.scenario} {worst.shape} {worst.mode})"
    )
    write_results(arguments.out, "load", throughputs=[asdict(one) for one in found])


if __name__ == "__main__":
    main()
