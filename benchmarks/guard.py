"""Compares the working tree with another commit: `run.py --base REV`. See README.md.

Each has a process of its own. The two take turns and never compute at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastrnn.bench.report import us
from fastrnn.bench.timing import Spread, alternate
from trees import ROOT

BASE, NOW = "base", "now"
LOSS = 1.10  # how many times as long a call may take before it counts

Job = tuple[str, str, int]  # shape, mode, threads


@dataclass(frozen=True)
class Comparison:
    """One shape at the base and now.

    Attributes:
        verdict: "loss", "gain" or "level"; "broken" if it has no figure now, "new" if it had none
            at the base.
        seconds: Time of a call, by side.
        problem: Why a figure is missing.
    """

    shape: str
    mode: str
    threads: int
    verdict: str
    seconds: dict[str, Spread]
    problem: str = ""


def judge(base: Spread, now: Spread) -> str:
    """One of "loss", "gain" and "level".

    A loss takes more than 10% longer by the medians, and is beyond noise: three quarters of the
    rounds now are slower than three quarters of the base's. A gain is the same the other way.
    """
    if now.median > LOSS * base.median and now.q1 > base.q3:
        return "loss"
    if base.median > LOSS * now.median and base.q1 > now.q3:
        return "gain"
    return "level"


class WorkerError(Exception):
    """A side has no figure; the message says why."""

    def __init__(self, side: str, problem: str) -> None:
        super().__init__(f"{side}: {problem}")
        self.side = side


class Worker:
    """A process that times one side, the fastrnn of a tree."""

    def __init__(self, side: str, tree: Path) -> None:
        self._side, self._tree = side, tree
        try:
            self._start()
        except WorkerError:
            self.close()
            raise

    def _start(self) -> None:
        path = os.pathsep.join([str(self._tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("guard_worker.py"))],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        found = Path(self._answer()["fastrnn"])
        if not found.is_relative_to(self._tree):
            raise WorkerError(self._side, f"the fastrnn of {self._tree} was wanted, not {found}")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise WorkerError(self._side, f"the process ended with status {self._process.wait()}")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer; a process that had died is replaced first.

        Raises:
            WorkerError: the worker met a problem, or died.
        """
        if self._process.poll() is not None:
            self.close()
            self._start()
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin)
        answer = self._answer()
        if "problem" in answer:
            raise WorkerError(self._side, answer["problem"])
        return answer

    def seconds_a_call(self, calls: int) -> float:
        """Times a slice of the shape that was built last."""
        return self.ask(calls=calls)["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def workers(trees: dict[str, Path]) -> Iterator[dict[str, Worker]]:
    """A worker for each side, ended afterwards."""
    started: dict[str, Worker] = {}
    try:
        for side, tree in trees.items():
            started[side] = Worker(side, tree)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def compare(job: Job, sides: dict[str, Worker], seconds: float) -> Comparison:
    """Times one shape on both sides."""
    shape, mode, threads = job
    try:
        # The working tree first: what it cannot do must not hide behind what the base cannot.
        for side in (NOW, BASE):
            sides[side].ask(shape=shape, mode=mode, threads=threads)
        timers = {side: sides[side].seconds_a_call for side in (BASE, NOW)}
        times = alternate(timers, seconds)
    except WorkerError as error:
        return Comparison(*job, "broken" if error.side == NOW else "new", {}, str(error))
    spreads = {side: Spread.of(values) for side, values in times.items()}
    return Comparison(*job, judge(spreads[BASE], spreads[NOW]), spreads)


def header() -> str:
    """The table's first line."""
    times = "".join(f"{f'{side} us':>12}{'q1..q3':>20}" for side in (BASE, NOW))
    return f"{'shape':<39} {'mode':<10}{'threads':>7}{times}{'base/now':>10}  verdict"


def row(found: Comparison) -> str:
    """One shape as a line under header."""
    line = f"{found.shape:<39} {found.mode:<10}{found.threads:>7}"
    if not found.seconds:
        return f"{line}  {found.verdict}: {found.problem}"
    for side in (BASE, NOW):
        spread = found.seconds[side]
        line += f"{us(spread.median):>12}{f'{us(spread.q1)}..{us(spread.q3)}':>20}"
    gain = found.seconds[BASE].median / found.seconds[NOW].median
    return f"{line}{gain:>10.2f}  {found.verdict}"


def compare_all(jobs: list[Job], base: Path, seconds: float) -> list[Comparison]:
    """Compares every job, showing each as it comes; those that lost are timed a second time.

    The second time is in fresh processes, because where a process happens to have its memory can
    cost more than 10% for as long as it lives. What lost only once is level.
    """
    trees = {BASE: base, NOW: ROOT}
    found: dict[Job, Comparison] = {}
    print(header())

    def measure(chosen: list[Job], note: str = "") -> None:
        with workers(trees) as sides, tqdm(chosen, unit="row", leave=False, disable=None) as bar:
            for job in bar:
                bar.set_postfix_str(f"{job[0]} {job[1]} {job[2]}")
                found[job] = compare(job, sides, seconds)
                bar.write(row(found[job]) + note)

    measure(jobs)
    if lost := [job for job in jobs if found[job].verdict == "loss"]:
        measure(lost, ", timed again")
    return [found[job] for job in jobs]


def passes(found: list[Comparison]) -> bool:
    """Whether no row lost or broke."""
    return not any(one.verdict in ("loss", "broken") for one in found)


def summary(found: list[Comparison]) -> str:
    """How many of each verdict, and the rows that fail the run."""
    kinds = ("loss", "broken", "gain", "level", "new")
    counts = ", ".join(f"{sum(one.verdict == kind for one in found)} {kind}" for kind in kinds)
    bad = [row(one) for one in found if not passes([one])]
    return "\n".join([f"{len(found)} rows: {counts}", *bad])
