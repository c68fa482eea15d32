"""Alternate timing of several implementations of the same work, robust on a noisy machine.

Rounds are short and many. In each round every implementation runs for about the same time, one
after the other, and the order turns round from one round to the next. What slows the machine for
a while slows both sides of a round, so ratios are taken within rounds, and the median of the
rounds is reported with its quartiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.benchmark import Timer

SLICE_SECONDS = 0.01  # one implementation's share of a round: a few scheduler ticks
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Spread of a list of at least one value."""
        q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75))
        return Spread(float(median), float(q1), float(q3))


def _warm_up(number: int) -> int:
    """Calls that Timer.timeit(number) makes before its clock starts."""
    return max(number // 100, 2)


def alternate(
    runs: dict[str, Callable[[], Any]], threads: int, seconds: float
) -> dict[str, list[float]]:
    """Times each of runs in alternating rounds.

    Args:
        runs: What to call, by name.
        threads: Intra-op threads; torch.set_num_threads(threads) should be in force already, so
            that no pool is resized between slices.
        seconds: Rough total to spend, warm-up included. Slow work takes longer: MIN_ROUNDS.

    Returns:
        Seconds a call, one entry a round, by name.
    """
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=threads)
        for name, run in runs.items()
    }
    cost = {name: timer.timeit(1).median for name, timer in timers.items()}
    slice_seconds = min(SLICE_SECONDS, seconds / (4 * MIN_ROUNDS * len(runs)))
    number = {name: max(1, round(slice_seconds / cost[name])) for name in runs}
    round_seconds = sum(cost[name] * (number[name] + _warm_up(number[name])) for name in runs)
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds / round_seconds)))

    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        order = list(runs) if index % 2 == 0 else list(runs)[::-1]
        for name in order:
            times[name].append(timers[name].timeit(number[name]).median)
    return times


def ratio(times: list[float], subject: list[float]) -> Spread:
    """Time over the subject's time, within each round: above 1 the subject is faster."""
    return Spread.of([mine / base for mine, base in zip(times, subject, strict=True)])
