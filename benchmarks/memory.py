"""Peak memory of a training step, fastrnn against torch.nn. See README.md beside this file.

Every allocation of the process is counted (heap.c, loaded before libc), so buffers that exist only
inside an operation, and those of libraries under torch, are seen; the figures are exact, and the
same at every run to some KiB. torch's profiler sees its own allocator alone, and a process's
resident size also counts what an allocator keeps, by pages.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastrnn
from fastrnn.bench.arguments import positive
from fastrnn.bench.shapes import Shape
from fastrnn.bench.work import REFERENCE, SUBJECT, Step, make_workload
from implementations import IMPLEMENTATIONS
from report import geomean, write_results
from selection import add_options, add_out, choose_modes, choose_shapes

_WARM_UPS, _CALLS = 2, 3  # the smallest peak of the calls counts: Python's own noise only adds


@dataclass(frozen=True)
class Usage:
    """Bytes that a call takes at most beyond what was there before it, by implementation."""

    shape: str
    mode: str
    peaks: dict[str, int]

    @property
    def ratio(self) -> float:
        """Fastrnn's peak over torch's: below 1 fastrnn takes less."""
        return self.peaks[SUBJECT] / self.peaks[REFERENCE]


class Heap:
    """The counters of heap.c.

    Raises:
        OSError: this process was not started with it.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        try:
            self._live, self._peak = library.heap_live, library.heap_peak
            self._reset = library.heap_reset_peak
        except AttributeError as error:
            raise OSError("heap.c is not loaded") from error
        self._live.restype = self._peak.restype = ctypes.c_long

    def peak_of(self, step: Step) -> int:
        """Bytes that step.run takes at most; its results count, what it was given does not."""
        peaks = []
        for call in range(_WARM_UPS + _CALLS):
            step.clear()
            fastrnn.release_memory()  # what it keeps from call to call counts
            gc.collect()
            before = self._live()
            self._reset()
            step.run()
            if call >= _WARM_UPS:
                peaks.append(self._peak() - before)
        return min(peaks)


def measure(shape: Shape, mode: str, heap: Heap) -> Usage:
    """Measures one shape in one mode."""
    peaks = {}
    with torch.inference_mode(mode == "inference"):
        for name, build in IMPLEMENTATIONS.items():
            step = build(make_workload(shape, mode))
            assert step is not None
            peaks[name] = heap.peak_of(step)
    return Usage(shape.id, mode, peaks)


def row(usage: Usage) -> str:
    """One line of the table."""
    sizes = "".join(f"{usage.peaks[name] / 1024:>14,.0f}" for name in IMPLEMENTATIONS)
    return f"{usage.shape:<39} {usage.mode:<10}{sizes}{usage.ratio:>9.2f}"


def summary(usages: list[Usage]) -> str:
    """Geometric mean and worst of each kind and mode, and all that take more than torch."""
    lines = [f"{'kind':<6}{'mode':<11}{'shapes':>7}{'geomean':>9}{'worst':>7}  worst shape"]
    for kind, mode in dict.fromkeys((Shape.parse(u.shape).kind, u.mode) for u in usages):
        group = [u for u in usages if (Shape.parse(u.shape).kind, u.mode) == (kind, mode)]
        worst = max(group, key=lambda usage: usage.ratio)
        lines.append(
            f"{kind:<6}{mode:<11}{len(group):>7}{geomean(u.ratio for u in group):>9.2f}"
            f"{worst.ratio:>7.2f}  {worst.shape}"
        )
    more = sorted((u for u in usages if u.ratio > 1), key=lambda usage: -usage.ratio)
    lines.append(f"\n{len(more)} of {len(usages)} above 1")
    return "\n".join(lines + [row(usage) for usage in more])


def start_again_counted() -> int:
    """Runs this command again with heap.c loaded; returns its exit status."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or not sys.platform.startswith("linux"):
        sys.exit("counting allocations needs Linux and a C compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "heap.so"
        source = Path(__file__).with_name("heap.c")
        flags = ["-O2", "-shared", "-fPIC", "-fno-builtin"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        # MKL, under torch, would keep its buffers from one call to the next and so hide them.
        environment = {"LD_PRELOAD": str(library), "MKL_DISABLE_FAST_MM": "1"}
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | environment).returncode


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/memory.py", description="Peak memory of a call, fastrnn and torch.nn."
    )
    add_options(parser, mode="training")
    parser.add_argument("--threads", type=positive, default=1, help="default 1")
    add_out(parser)
    return parser.parse_args()


def main() -> int:
    """Measures and prints; writes memory.json."""
    arguments = parse_arguments()
    try:
        heap = Heap()
    except OSError:
        return start_again_counted()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    usages = []
    columns = "".join(f"{f'{name} KiB':>14}" for name in IMPLEMENTATIONS)
    print(f"{'shape':<39} {'mode':<10}{columns}{'ratio':>9}")
    for mode in choose_modes(arguments):
        for shape in choose_shapes(arguments):
            usages.append(measure(shape, mode, heap))
            print(row(usages[-1]), flush=True)
    print(f"\n{SUBJECT} over {REFERENCE}, {arguments.threads} threads\n{summary(usages)}")
    write_results(arguments.out, "memory", usages=[asdict(usage) for usage in usages])
    return 0


if __name__ == "__main__":
    sys.exit(main())
