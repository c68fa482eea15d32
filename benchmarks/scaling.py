"""How time grows with T, B, H and the number of threads, as pictures. See README.md."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from tqdm import tqdm

import fastrnn
from fastrnn.bench.arguments import positive, seconds
from fastrnn.bench.machine import machine
from fastrnn.bench.measure import MODES
from fastrnn.bench.shapes import Shape
from fastrnn.bench.work import REFERENCE, SUBJECT
from measure import Record, measure
from peak import Peak
from report import save
from selection import add_out

KINDS = ("rnn", "lstm")
_STYLES = {SUBJECT: "-", REFERENCE: "--"}
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")

Found = dict[tuple[str, str, int], Record]  # by shape, mode and threads


@dataclass(frozen=True)
class Sweep:
    """One dimension that grows while the others stay.

    Attributes:
        axis: Its letter.
        sizes: Shape ids without the kind; {} stands for the value.
        values: The values.
    """

    axis: str
    sizes: tuple[str, ...]
    values: tuple[int, ...]


SWEEPS = (
    Sweep("T", ("B1-T{0}-I128-H128", "B32-T{0}-I128-H128"), (1, 2, 5, 10, 20, 50, 100, 200)),
    Sweep("B", ("B{0}-T50-I64-H64", "B{0}-T20-I256-H256"), (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    Sweep(
        "H",
        ("B1-T20-I{0}-H{0}", "B32-T20-I{0}-H{0}"),
        (8, 16, 32, 50, 64, 100, 128, 200, 256, 400, 512, 768, 1024),
    ),
)
# By how the work is split: hidden units, directions, and rows three times.
THREAD_SIZES = (
    "B1-T50-I256-H256",
    "B1-T50-I128-H128-bi",
    "B8-T50-I128-H128",
    "B32-T20-I256-H256",
    "B256-T20-I64-H64",
)


def measure_all(ids: list[str], counts: list[int], modes: list[str], seconds: float) -> Found:
    """Measures every id once for each mode and number of threads."""
    found: Found = {}
    # The share of peak is not shown here, so any peak will do.
    peak = Peak.given(float("inf"))
    jobs = [(text, mode, count) for count in counts for mode in modes for text in ids]
    for text, mode, count in tqdm(jobs, unit="row", leave=False, disable=None):
        record = measure(Shape.parse(text), mode, count, seconds, peak)
        found[text, mode, count] = record
        if record.problem:
            print(f"{text} {mode} {count}: {record.problem}", file=sys.stderr)
    return found


def _good(found: Found, key: tuple[str, str, int]) -> Record | None:
    record = found.get(key)
    return None if record is None or record.problem else record


def _logarithmic(axes: Axes, axis: str, base: int) -> None:
    """Makes an axis logarithmic, with plain numbers on it."""
    getattr(axes, f"set_{axis}scale")("log", base=base)
    ticks = getattr(axes, f"{axis}axis")
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _draw_sweep(
    times: Axes, ratios: Axes, found: Found, kind: str, mode: str, sweep: Sweep
) -> None:
    """Times of both above, their ratio below, a colour each."""
    for sizes, color in zip(sweep.sizes, _COLORS, strict=False):
        records = {
            value: record
            for value in sweep.values
            if (record := _good(found, (f"{kind}-{sizes.format(value)}", mode, 1)))
        }
        for name, style in _STYLES.items():
            medians = [record.seconds[name].median * 1e6 for record in records.values()]
            label = f"{sizes.format('*')}, {name}"
            times.plot(list(records), medians, style, color=color, marker=".", label=label)
        spreads = [record.ratios[REFERENCE] for record in records.values()]
        ratios.plot(list(records), [s.median for s in spreads], color=color, marker=".")
        ratios.fill_between(
            list(records), [s.q1 for s in spreads], [s.q3 for s in spreads], color=color, alpha=0.2
        )
    ratios.axhline(1, color="black", linewidth=1)
    panels = ((times, f"{kind.upper()}, us", 10), (ratios, f"{REFERENCE} / {SUBJECT}", 2))
    for axes, label, base in panels:
        _logarithmic(axes, "x", 2)
        _logarithmic(axes, "y", base)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    times.legend(fontsize=8)
    ratios.set_xlabel(sweep.axis)


def draw_sweeps(path: Path, found: Found, mode: str, title: str) -> None:
    """Writes a PNG: time and ratio of both kinds over T, B and H, on one thread."""
    figure, grid = plt.subplots(
        2 * len(KINDS), len(SWEEPS), figsize=(15, 15), sharex="col", layout="constrained"
    )
    for index, kind in enumerate(KINDS):
        for column, sweep in enumerate(SWEEPS):
            times, ratios = grid[2 * index, column], grid[2 * index + 1, column]
            _draw_sweep(times, ratios, found, kind, mode, sweep)
    figure.suptitle(f"{title}, {mode}, 1 thread")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_threads(path: Path, found: Found, counts: list[int], modes: list[str], title: str) -> None:
    """Writes a PNG: speed at each number of threads over the speed at one."""
    figure, grid = plt.subplots(
        len(modes), len(KINDS), figsize=(11, 4.5 * len(modes)), squeeze=False, layout="constrained"
    )
    for row, mode in enumerate(modes):
        for column, kind in enumerate(KINDS):
            axes = grid[row, column]
            for sizes, color in zip(THREAD_SIZES, _COLORS, strict=True):
                text = f"{kind}-{sizes}"
                records = {n: r for n in counts if (r := _good(found, (text, mode, n)))}
                if 1 not in records:
                    continue
                for name, style in _STYLES.items():
                    single = records[1].seconds[name].median
                    gains = [single / record.seconds[name].median for record in records.values()]
                    label = f"{sizes}, {name}"
                    axes.plot(list(records), gains, style, color=color, marker=".", label=label)
            axes.plot(counts, counts, color="black", linewidth=0.7, linestyle=":")
            axes.set_xticks(counts)
            axes.set_title(f"{kind.upper()} {mode}")
            axes.set_xlabel("threads")
            axes.set_ylabel("speed over one thread's")
            axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/scaling.py", description="Time over T, B, H and threads, as pictures."
    )
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    add("--mode", choices=(*MODES, "both"), default="both")
    add("--max-threads", type=positive, default=cores, metavar="N", help="default: the cores")
    add("--seconds", type=seconds, default=0.3, metavar="S", help="per row; default 0.3")
    add_out(parser)
    return parser.parse_args()


def main() -> int:
    """Measures and draws; writes scaling-MODE.png, threads.png and scaling.json.

    Returns:
        1 if some shape has no figure, else 0.
    """
    arguments = parse_arguments()
    modes = list(MODES) if arguments.mode == "both" else [arguments.mode]
    about = {"machine": machine(), "build_info": fastrnn.build_info()}
    swept = [
        sizes.format(value) for sweep in SWEEPS for value in sweep.values for sizes in sweep.sizes
    ]

    def ids(every: tuple[str, ...] | list[str]) -> list[str]:
        return [f"{kind}-{sizes}" for kind in KINDS for sizes in dict.fromkeys(every)]

    counts = list(range(1, arguments.max_threads + 1))
    found = measure_all(ids(swept), [1], modes, arguments.seconds)
    found |= measure_all(ids(THREAD_SIZES), counts, modes, arguments.seconds)

    arguments.out.mkdir(parents=True, exist_ok=True)
    title = f"{about['machine']['processor']}, torch {torch.__version__}"
    for mode in modes:
        draw_sweeps(arguments.out / f"scaling-{mode}.png", found, mode, title)
    if len(counts) > 1:
        draw_threads(arguments.out / "threads.png", found, counts, modes, title)
    records = list(found.values())
    command = shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    save(arguments.out / "scaling.json", records, command, about)
    print(f"written: {arguments.out}")
    return int(any(record.problem for record in records))


if __name__ == "__main__":
    sys.exit(main())
