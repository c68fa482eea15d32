"""What was measured, in words, as a table, as JSON and as a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastrnn.bench.measure import Measurement
from fastrnn.bench.timing import Spread
from fastrnn.bench.work import REFERENCE

LABELS = {REFERENCE: "torch.nn"}  # what a reader knows an implementation as, if not by its name
LEVEL = 0.02  # a difference too small to be worth a word
WIDE = 1.5  # quartiles that are further apart than that leave the median in doubt


def label(name: str) -> str:
    """An implementation's name for a reader."""
    return LABELS.get(name, name)


def verdict(ratio: Spread) -> str:
    """One of "faster", "slower" and "level": fastrnn, held against another.

    Args:
        ratio: The other's time over fastrnn's. Level is within 2% of 1, or 1 between quartiles.
    """
    if abs(ratio.median - 1) <= LEVEL or ratio.q1 <= 1 <= ratio.q3:
        return "level"
    return "faster" if ratio.median > 1 else "slower"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def _against(name: str, ratio: Spread) -> str:
    """What comes after "fastrnn is"."""
    found = verdict(ratio)
    quartiles = f" (quartiles {_number(ratio.q1)} to {_number(ratio.q3)}: not to be relied on)"
    doubt = quartiles if ratio.q3 > WIDE * ratio.q1 else ""
    if found == "faster":
        return f"{_number(ratio.median)} times as fast as {label(name)}{doubt}"
    if found == "slower":
        times = _number(1 / ratio.median)
        return f"slower than {label(name)}, taking {times} times as long{doubt}"
    return f"level with {label(name)}{doubt}"


def sentence(ratios: dict[str, Spread], where: str) -> str:
    """What to expect, where ("on 1 thread"), against each that has a figure."""
    if not ratios:
        return f"For this shape, {where}, there is nothing to compare."
    parts = ", and ".join(_against(name, ratio) for name, ratio in ratios.items())
    return f"For this shape, {where}, fastrnn is {parts}."


def us(seconds: float) -> str:
    """Microseconds, as precise as a reader needs."""
    return f"{seconds * 1e6:,.{1 if seconds < 1e-3 else 0}f}"


def table(measurements: list[Measurement], names: list[str]) -> str:
    """A line per implementation and number of threads."""
    lines = [
        f"{'threads':>7}  {'implementation':<15}{'us a call':>12}{'q1..q3':>20}"
        f"{'over fastrnn':>14}{'q1..q3':>18}"
    ]
    for found in measurements:
        for name in names:
            line = f"{found.threads:>7}  {label(name):<15}"
            if name in found.problems:
                lines.append(f"{line}   no figure: {found.problems[name]}")
                continue
            if name not in found.seconds:
                lines.append(f"{line}   not timed")
                continue
            spread = found.seconds[name]
            line += f"{us(spread.median):>12}{f'{us(spread.q1)}..{us(spread.q3)}':>20}"
            if (ratio := found.ratios.get(name)) is not None:
                line += f"{ratio.median:>14.2f}{f'{ratio.q1:.2f}..{ratio.q3:.2f}':>18}"
            lines.append(line)
    return "\n".join(lines)


def as_json(
    about: dict[str, Any], measurements: list[Measurement], sentences: list[str]
) -> dict[str, Any]:
    """What --json writes: what was asked and where it ran, then an entry per number of threads."""
    results = [
        asdict(found) | {"sentence": text}
        for found, text in zip(measurements, sentences, strict=True)
    ]
    return {**about, "results": results}


def draw(path: Path, measurements: list[Measurement], names: list[str], title: str) -> None:
    """Writes a picture: time of a call, a point per implementation, groups by number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        shown = [
            (group + (index + 0.5) * width - 0.4, found.seconds[name])
            for group, found in enumerate(measurements)
            if name in found.seconds
        ]
        places = [place for place, _ in shown]
        medians = [spread.median * 1e6 for _, spread in shown]
        below = [(spread.median - spread.q1) * 1e6 for _, spread in shown]
        above = [(spread.q3 - spread.median) * 1e6 for _, spread in shown]
        axes.errorbar(places, medians, [below, above], fmt="o", capsize=4, label=label(name))
        for place, median in zip(places, medians, strict=True):
            axes.annotate(f"{median:,.3g}", (place, median), (6, 0), textcoords="offset points")
    threads = [found.threads for found in measurements]
    axes.set_xticks(range(len(threads)), [f"{n} thread{'s' * (n > 1)}" for n in threads])
    axes.set(title=title, ylabel="us a call, with quartiles", yscale="log")
    axes.set_xlim(-0.5, len(threads) - 0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
