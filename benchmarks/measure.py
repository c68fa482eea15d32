"""One measurement of a shape: what it takes, and what that is in operations a second."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrnn.bench import measure as bench
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import Spread
from fastrnn.bench.work import SUBJECT
from implementations import IMPLEMENTATIONS
from peak import Peak


@dataclass(frozen=True)
class Record:
    """What was found for one shape, in one mode, at one number of threads.

    Attributes:
        shape: The shape's id.
        problem: Empty if all went well; else why there is no figure, or whose results are wrong.
        rounds: How many rounds the spreads are over.
        seconds: Time of a call, by implementation.
        ratios: An implementation's time over fastrnn's: above 1 fastrnn is faster.
        gflops: GFLOP/s of the matrix products (1e9 a second), by implementation.
        peak: GFLOP/s of one core's multiply-adds, measured just before.
        share: fastrnn's gflops over the peak of that many cores.
    """

    shape: str
    mode: str
    threads: int
    problem: str = ""
    rounds: int = 0
    seconds: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0
    share: float = 0.0


def measure(shape: Shape, mode: str, threads: int, seconds: float, peak: Peak) -> Record:
    """Checks and times one shape.

    Args:
        shape: What to measure.
        mode: "inference" (in torch.inference_mode, eval mode) or "training" (forward, and backward
            to all weights and x).
        threads: Intra-op threads.
        seconds: Rough time to spend.
        peak: What the share is taken of.

    Returns:
        The figures; or, where an implementation raises or is wrong, a record that says so, so
        that one bad shape does not cost the rest of a long run.
    """
    core = peak.of(shape.dtype)
    try:
        found = bench.measure(shape, mode, threads, seconds, IMPLEMENTATIONS)
    except Exception as error:
        return Record(shape.id, mode, threads, problem=bench.describe(error))
    if found.problems:
        problem = "; ".join(f"{name}: {text}" for name, text in found.problems.items())
        return Record(shape.id, mode, threads, problem=problem)
    gflops = {
        name: shape.flops(mode) / spread.median / 1e9 for name, spread in found.seconds.items()
    }
    return Record(
        shape.id,
        mode,
        threads,
        rounds=found.rounds,
        seconds=found.seconds,
        ratios=found.ratios,
        gflops=gflops,
        peak=core,
        share=gflops[SUBJECT] / (core * threads),
    )
