"""One measurement: build, check against torch.nn, time alternately."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrnn.bench.check import mismatches
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import Spread, alternate, cpu_timer, cuda_timer, ratio, settle
from fastrnn.bench.work import REFERENCE, SUBJECT, Build, Step, Workload, make_workload

MODES = ("inference", "training")

# Of weights and inputs. A gradient of relu jumps where a rounding turns a sign, which is no fault.
_RELU_DRAWS = 3


@dataclass(frozen=True)
class Measurement:
    """What was found for one shape, in one mode, at one number of threads.

    Attributes:
        threads: Intra-op threads.
        rounds: How many rounds the spreads are over.
        seconds: Time of a call, by implementation.
        ratios: An implementation's time over fastrnn's, taken within each round: above 1 fastrnn
            is faster.
        problems: Why an implementation has no figure: what it raised, or how its results differ.
    """

    threads: int
    rounds: int = 0
    seconds: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def describe(error: BaseException) -> str:
    """An exception as one line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


def build_steps(work: Workload, builds: dict[str, Build]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps whose results are the reference's, and why the others have no figure."""
    steps: dict[str, Step] = {}
    problems: dict[str, str] = {}
    expected: dict[str, Tensor] = {}
    for name, build in builds.items():
        try:
            if (step := build(work)) is None:
                continue
            results = step.results()
        except Exception as error:
            problems[name] = describe(error)
            continue
        if name == REFERENCE:
            expected = results
        if wrong := mismatches(results, expected):
            problems[name] = "; ".join(wrong)
        else:
            steps[name] = step
    return steps, problems


def measure(
    shape: Shape,
    mode: str,
    threads: int,
    seconds: float,
    builds: dict[str, Build],
    device: str = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Measurement:
    """Checks and times one shape.

    Args:
        shape: What to measure.
        mode: "inference" (in torch.inference_mode, eval mode) or "training" (forward, and backward
            to all weights and x).
        threads: Intra-op threads.
        seconds: Rough time to spend.
        builds: What to time, torch.nn first: it is what results are checked against.
        device: "cpu" or "cuda".
        progress: Wraps the rounds, to show how far they are.
    """
    torch.set_num_threads(threads)
    with torch.inference_mode(mode == "inference"):
        for seed in range(_RELU_DRAWS if shape.nonlinearity == "relu" else 1):
            steps, problems = build_steps(make_workload(shape, mode, device, seed), builds)
            if SUBJECT in steps:
                break
        if SUBJECT not in steps or REFERENCE not in steps:
            return Measurement(threads, problems=problems)
        timers = {
            name: cuda_timer(step.run) if device == "cuda" else cpu_timer(step.run, threads)
            for name, step in steps.items()
        }
        pools_differ = any(step.own_threads for step in steps.values())
        rest = settle if threads > 1 and pools_differ else lambda: None
        times = alternate(timers, seconds, rest, progress)
    return Measurement(
        threads,
        rounds=len(times[SUBJECT]),
        seconds={name: Spread.of(values) for name, values in times.items()},
        ratios={n: ratio(t, times[SUBJECT]) for n, t in times.items() if n != SUBJECT},
        problems=problems,
    )
