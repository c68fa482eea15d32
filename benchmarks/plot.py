"""Ratios as a picture; and, as a script, several saved runs side by side.

python benchmarks/plot.py before.json after.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from fastrnn.bench.measure import MODES
from fastrnn.bench.work import REFERENCE, SUBJECT
from measure import Record
from report import geomean, groups, load, ratio_summary

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_MARKERS = "osD^vP"


def _kind(record: Record) -> str:
    return record.shape.split("-")[0]


def _mark_ratios(axes: Axes, baseline: str) -> None:
    """The axis of ratios to `baseline`, on a log scale that 1 is on."""
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(axes.get_xlim()[0], 0.5), max(axes.get_xlim()[1], 2.0))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{baseline} time / {SUBJECT} time")


def _draw_panel(
    axes: Axes, runs: dict[str, list[Record]], baseline: str, shapes: list[str]
) -> None:
    """One panel: a row per shape, a point per run and number of threads, a bar for quartiles."""
    counts = sorted({record.threads for records in runs.values() for record in records})
    series = [(label, threads) for label in runs for threads in counts]
    for index, (label, threads) in enumerate(series):
        offset = 0.5 * (index + 0.5) / len(series) - 0.25
        points = [
            (shapes.index(record.shape) + offset, record.ratios[baseline])
            for record in runs[label]
            if record.threads == threads and record.shape in shapes and baseline in record.ratios
        ]
        if not points:
            continue
        medians = [spread.median for _, spread in points]
        below = [spread.median - spread.q1 for _, spread in points]
        above = [spread.q3 - spread.median for _, spread in points]
        name = f"{threads} thread{'s' if threads > 1 else ''}"
        axes.errorbar(
            medians,
            [position for position, _ in points],
            xerr=[below, above],
            fmt=_MARKERS[list(runs).index(label) % len(_MARKERS)],
            color=_COLORS[index % len(_COLORS)],
            markersize=4,
            linewidth=1,
            label=f"{label}, {name}" if len(runs) > 1 else name,
        )
    _mark_ratios(axes, baseline)
    axes.set_yticks(range(len(shapes)), [shape.split("-", 1)[1] for shape in shapes], fontsize=8)
    for boundary in range(1, len(shapes)):
        axes.axhline(boundary - 0.5, color="0.92", linewidth=0.6)
    axes.set_ylim(len(shapes) - 0.4, -0.6)


def draw(path: Path, runs: dict[str, list[Record]], baseline: str, title: str) -> None:
    """Writes a PNG: time of baseline over time of fastrnn, log scale, one panel a kind and mode.

    Args:
        path: Where to write.
        runs: Records by the name to show for them.
        baseline: Whose ratio to show.
        title: A line for the top.
    """
    every = [r for records in runs.values() for r in records if baseline in r.ratios]
    panels = list(dict.fromkeys((_kind(record), record.mode) for record in every))
    panels.sort(key=lambda panel: (panel[0] != "rnn", MODES.index(panel[1])))
    if not panels:
        return
    shapes = {
        kind: list(dict.fromkeys(record.shape for record in every if _kind(record) == kind))
        for kind, _ in panels
    }
    size = (4 * len(panels) + 2, 2 + 0.21 * max(len(ids) for ids in shapes.values()))
    figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for index, (axes, (kind, mode)) in enumerate(zip(grid[0], panels, strict=True)):
        chosen = {
            label: [r for r in records if (_kind(r), r.mode) == (kind, mode)]
            for label, records in runs.items()
        }
        _draw_panel(axes, chosen, baseline, shapes[kind])
        axes.set_title(f"{kind.upper()} {mode}")
        axes.tick_params(labelleft=index == 0 or panels[index - 1][0] != kind)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_overview(path: Path, records: list[Record], baseline: str, title: str) -> None:
    """Writes a PNG: a line a kind and mode, a tick for each shape, a point for the geometric mean.

    Args:
        path: Where to write.
        records: What to show.
        baseline: Whose ratio to show.
        title: A line for the top.
    """
    found = list(groups([record for record in records if baseline in record.ratios]))
    if not found:
        return
    lines = list(dict.fromkeys((kind, mode) for kind, mode, _, _ in found))
    counts = sorted({threads for _, _, threads, _ in found})
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(lines)), layout="constrained")
    for kind, mode, threads, group in found:
        index = counts.index(threads)
        position = lines.index((kind, mode)) + 0.8 * (index + 0.5) / len(counts) - 0.4
        ratios = [record.ratios[baseline].median for _, record in group]
        mean, color = geomean(ratios), _COLORS[index]
        # In the legend once.
        label = f"{threads} thread{'s' if threads > 1 else ''}" if position < 0.5 else None
        axes.plot(ratios, [position] * len(ratios), "|", color=color, markersize=9, alpha=0.6)
        axes.plot(mean, position, "o", color=color, markeredgecolor="black", label=label)
        axes.annotate(
            f"{mean:.1f}",
            (mean, position),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    _mark_ratios(axes, baseline)
    axes.set_yticks(range(len(lines)), [f"{kind.upper()} {mode}" for kind, mode in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.legend(loc="upper right", fontsize=8)
    axes.set_title(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _print_changes(before: list[Record], after: list[Record], count: int = 10) -> None:
    """The rows whose ratio changed most, and the change over all."""
    old = {(r.shape, r.mode, r.threads): r.ratios for r in before}
    changes = {}
    for r in after:
        key = (r.shape, r.mode, r.threads)
        if REFERENCE in r.ratios and REFERENCE in old.get(key, {}):
            changes[key] = r.ratios[REFERENCE].median / old[key][REFERENCE].median
    ordered = sorted(changes, key=changes.__getitem__)
    print(f"\nratio after / before: geomean {geomean(changes.values()):.3f} of {len(ordered)} rows")
    for key in [*ordered[:count], *ordered[max(count, len(ordered) - count) :]]:
        print(f"{changes[key]:>8.2f}  {key[0]} {key[1]} {key[2]}")


def main() -> None:
    """Prints each run's summary, then what changed from the first to the last; draws them all."""
    parser = argparse.ArgumentParser(description="Compare runs that run.py saved.")
    parser.add_argument("files", nargs="+", type=Path, help="results.json of one or more runs")
    default = Path(__file__).parent / "out" / "compare.png"
    what = "PNG to write; default benchmarks/out/compare.png"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help=what)
    arguments = parser.parse_args()
    runs = {}
    for path in arguments.files:
        try:
            runs[str(path)] = load(path)
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"{path} is not a results.json that run.py wrote")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name, records in runs.items():
        print(f"\n{name}", *ratio_summary(records), sep="\n")
    if len(runs) > 1:
        _print_changes(runs[str(arguments.files[0])], runs[str(arguments.files[-1])])
    draw(arguments.out, runs, REFERENCE, " and ".join(runs))


if __name__ == "__main__":
    main()
