"""Alternate timing of several implementations of the same work, robust on a noisy machine.

Rounds are short and many. In each round every implementation runs for about the same time, one
after the other, and the order turns round from one round to the next. What slows the machine for
a while slows both sides of a round, so ratios are taken within rounds, and the median of the
rounds is reported with its quartiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

SLICE_SECONDS = 0.01  # one implementation's share of a round: a few scheduler ticks
MIN_ROUNDS, MAX_ROUNDS = 9, 200  # so that a quartile is more than the second-best round
SETTLE_SECONDS = 0.002  # how long the process must be idle to count as settled
SETTLE_LIMIT = 0.2  # and how long it is waited for


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Spread of a list of at least one value."""
        rounds = torch.tensor(values, dtype=torch.float64)
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        q1, median, q3 = rounds.quantile(quartiles).tolist()
        return Spread(median, q1, q3)


def _warm_up(number: int) -> int:
    """Calls that Timer.timeit(number) makes before its clock starts, and the CUDA timer too."""
    return max(number // 100, 2)


def cpu_timer(run: Callable[[], Any], threads: int) -> Callable[[int], float]:
    """A function that calls run a number of times and returns the seconds a call.

    torch.set_num_threads(threads) should be in force already, so that no pool is resized.
    """
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    return lambda number: timer.timeit(number).median


def cuda_timer(run: Callable[[], Any]) -> Callable[[int], float]:
    """The same between two events of the current stream; the host waits for the second alone."""

    def seconds_a_call(number: int) -> float:
        for _ in range(_warm_up(number)):
            run()
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(number):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / number

    return seconds_a_call


def settle() -> None:
    """Waits until no thread of this process is busy.

    A pool's threads spin for a while after the last call, to be there for the next one: 10 ms in
    OpenMP, 40 ms in ONNX Runtime. Meanwhile they would take a core from another pool's slice.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < SETTLE_LIMIT:
        busy = time.process_time()
        time.sleep(SETTLE_SECONDS)
        if time.process_time() - busy < SETTLE_SECONDS / 4:
            return


def alternate(
    timers: Mapping[str, Callable[[int], float]],
    seconds: float,
    rest: Callable[[], None] = lambda: None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Has each of timers measure in alternating rounds.

    Args:
        timers: By name, what makes a number of calls and returns the seconds a call.
        seconds: Rough total to spend, warm-up included. Slow work takes longer: MIN_ROUNDS.
        rest: Called before each slice.
        progress: Wraps the rounds, to show how far they are; tqdm, say.

    Returns:
        Seconds a call, one entry a round, by name.
    """
    cost = {}
    resting = 0.0
    for name, timer in timers.items():
        cost[name] = timer(1)
        start = time.perf_counter()
        rest()
        resting += time.perf_counter() - start
    slice_seconds = min(SLICE_SECONDS, seconds / (4 * MIN_ROUNDS * len(timers)))
    number = {name: max(1, round(slice_seconds / cost[name])) for name in timers}
    working = sum(cost[name] * (number[name] + _warm_up(number[name])) for name in timers)
    round_seconds = resting + working
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds / round_seconds)))

    times: dict[str, list[float]] = {name: [] for name in timers}
    for index in progress(range(rounds)):
        order = list(timers) if index % 2 == 0 else list(timers)[::-1]
        for name in order:
            rest()
            times[name].append(timers[name](number[name]))
    return times


def ratio(times: list[float], subject: list[float]) -> Spread:
    """Time over the subject's time, within each round: above 1 the subject is faster."""
    return Spread.of([mine / base for mine, base in zip(times, subject, strict=True)])
