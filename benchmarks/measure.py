"""One measurement: build, check, time, count."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cells import Cell
from check import mismatches
from implementations import IMPLEMENTATIONS, REFERENCE, SUBJECT, Step, make_workload
from peak import Peak
from timing import Spread, alternate, ratio

MODES = ("inference", "training")


@dataclass(frozen=True)
class Record:
    """What was found for one cell, in one mode, at one number of threads.

    Attributes:
        cell: The cell's id.
        problem: Empty if all went well; else why there is no figure, or whose results are wrong.
        rounds: How many rounds the spreads are over.
        seconds: Time of a call, by implementation.
        ratios: An implementation's time over fastrnn's: above 1 fastrnn is faster.
        gflops: GFLOP/s of the matrix products (1e9 a second), by implementation.
        share: fastrnn's gflops over the FMA peak of that many cores.
    """

    cell: str
    mode: str
    threads: int
    problem: str = ""
    rounds: int = 0
    seconds: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    share: float = 0.0


def _build_and_check(cell: Cell, mode: str) -> dict[str, Step]:
    """Steps of all implementations that do this cell, once each agrees with the reference.

    Raises:
        ArithmeticError: an implementation's results are not the reference's.
    """
    work = make_workload(cell, mode)
    built = {name: build(work) for name, build in IMPLEMENTATIONS.items()}
    steps = {name: step for name, step in built.items() if step is not None}
    expected = steps[REFERENCE].results()
    for name, step in steps.items():
        if name != REFERENCE and (wrong := mismatches(step.results(), expected)):
            raise ArithmeticError(f"{name}: {'; '.join(wrong)}")
    return steps


def measure(cell: Cell, mode: str, threads: int, seconds: float, peak: Peak) -> Record:
    """Checks and times one cell.

    Args:
        cell: What to measure.
        mode: "inference" (in torch.inference_mode, eval mode) or "training" (forward, and backward
            to all weights and x).
        threads: Intra-op threads.
        seconds: Rough time to spend.
        peak: What the share is taken of.

    Returns:
        The figures; or, where an implementation raises or is wrong, a record that says so, so
        that one bad cell does not cost the rest of a long run.
    """
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(mode == "inference"):
            steps = _build_and_check(cell, mode)
            runs = {name: step.run for name, step in steps.items()}
            several_pools = threads > 1 and any(step.own_threads for step in steps.values())
            times = alternate(runs, threads, seconds, several_pools)
    except Exception as error:
        return Record(cell.id, mode, threads, problem=f"{type(error).__name__}: {error}")
    spreads = {name: Spread.of(values) for name, values in times.items()}
    gflops = {name: cell.flops(mode) / spread.median / 1e9 for name, spread in spreads.items()}
    return Record(
        cell.id,
        mode,
        threads,
        rounds=len(times[SUBJECT]),
        seconds=spreads,
        ratios={n: ratio(t, times[SUBJECT]) for n, t in times.items() if n != SUBJECT},
        gflops=gflops,
        share=gflops[SUBJECT] / (peak.of(cell.dtype) * threads),
    )
