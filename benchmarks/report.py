"""From records to text and JSON, and back."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastrnn.bench.machine import machine
from fastrnn.bench.measure import MODES
from fastrnn.bench.report import us
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import Spread
from fastrnn.bench.work import REFERENCE, SUBJECT
from measure import Record


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def header(implementations: list[str]) -> str:
    """The table's first line: times, ratios with their quartiles, fastrnn's rate."""
    baselines = [name for name in implementations if name != SUBJECT]
    times = "".join(f"{f'{name} us':>16}" for name in implementations)
    ratios = "".join(f"{f'{name}/{SUBJECT}':>21}  {'q1..q3':>16}" for name in baselines)
    return f"{'shape':<39} {'mode':<10}{'threads':>7}{times}{ratios}{'GFLOP/s':>9}{'of peak':>8}"


def row(record: Record, implementations: list[str]) -> str:
    """One record as a line under header."""
    line = f"{record.shape:<39} {record.mode:<10}{record.threads:>7}"
    if record.problem:
        return f"{line}  {record.problem}"
    for name in implementations:
        line += f"{us(record.seconds[name].median) if name in record.seconds else '-':>16}"
    for name in implementations:
        if name == SUBJECT:
            continue
        spread = record.ratios.get(name)
        quartiles = f"{spread.q1:.2f}..{spread.q3:.2f}" if spread else ""
        line += f"{f'{spread.median:.2f}' if spread else '-':>21}  {quartiles:>16}"
    return f"{line}{record.gflops[SUBJECT]:>9.1f}{record.share:>8.0%}"


def groups(records: list[Record]) -> Iterator[tuple[str, str, int, list[tuple[Shape, Record]]]]:
    """Records without a problem, by (kind, mode, threads); empty groups are left out."""
    good = [(Shape.parse(record.shape), record) for record in records if not record.problem]
    counts = sorted({record.threads for record in records})
    for kind, mode, threads in product(("rnn", "lstm"), MODES, counts):
        group = [
            (shape, record)
            for shape, record in good
            if (shape.kind, record.mode, record.threads) == (kind, mode, threads)
        ]
        if group:
            yield kind, mode, threads, group


def with_best_peer(record: Record) -> dict[str, Spread]:
    """A record's ratios; and, where peers were timed, that to the fastest of them."""
    peers = [spread for name, spread in record.ratios.items() if name != REFERENCE]
    if not peers:
        return record.ratios
    return record.ratios | {"best peer": min(peers, key=lambda spread: spread.median)}


def ratio_summary(records: list[Record]) -> list[str]:
    """Geometric mean and worst shape of each group against each baseline."""
    lines = []
    for kind, mode, threads, group in groups(records):
        found = {shape: with_best_peer(record) for shape, record in group}
        for name in dict.fromkeys(name for spreads in found.values() for name in spreads):
            ratios = {
                shape: spreads[name].median for shape, spreads in found.items() if name in spreads
            }
            single = [r for shape, r in ratios.items() if shape.dtype == torch.float32]
            worst = min(ratios, key=ratios.__getitem__)
            lines.append(
                f"{f'{name}/{SUBJECT}':<22}{kind:<6}{mode:<11}{threads:>7}{len(ratios):>7}"
                f"{geomean(ratios.values()):>9.2f}"
                f"{f'{geomean(single):.2f}' if single else '-':>9}"
                f"{ratios[worst]:>7.2f}  {worst.id}"
            )
    title = (
        f"{'ratio of':<22}{'kind':<6}{'mode':<11}{'threads':>7}{'shapes':>7}{'geomean':>9}"
        f"{'f32 only':>9}{'worst':>7}  worst shape"
    )
    return [title, *lines] if lines else []


def loss_summary(records: list[Record], most: int = 30) -> list[str]:
    """The shapes where fastrnn is slower beyond noise: three quarters of the rounds say so."""
    losses = [
        (spread, name, record)
        for record in records
        for name, spread in record.ratios.items()
        if spread.q3 < 1
    ]
    losses.sort(key=lambda loss: loss[0].median)
    lines = [
        f"{spread.median:>6.2f}  {f'{name}/{SUBJECT}':<22}{record.shape} {record.mode} "
        f"{record.threads}"
        for spread, name, record in losses[:most]
    ]
    slower = sum(s.median < 1 for record in records for s in record.ratios.values())
    title = (
        f"{len(losses)} ratios below 1 beyond noise (their third quartile is below 1; of "
        f"{slower} the median is)"
    )
    return [title, *lines] if records else []


_GROUP_HEADER = f"{'kind':<6}{'mode':<11}{'threads':>7}{'shapes':>7}{'geomean':>9}{'worst':>7}"


def _group_row(kind: str, mode: str, threads: int, values: dict[Shape, float], form: str) -> str:
    """A group's geometric mean and worst shape under _GROUP_HEADER, as `form` formats them."""
    worst = min(values, key=values.__getitem__)
    return (
        f"{kind:<6}{mode:<11}{threads:>7}{len(values):>7}{geomean(values.values()):>9{form}}"
        f"{values[worst]:>7{form}}  {worst.id}"
    )


def peak_summary(records: list[Record]) -> list[str]:
    """Share of the FMA peak over the compute-bound shapes of each group."""
    lines = []
    for kind, mode, threads, group in groups(records):
        shares = {shape: record.share for shape, record in group if shape.compute_bound}
        if shares:
            lines.append(_group_row(kind, mode, threads, shares, ".0%"))
    title = "share of FMA peak, shapes of B >= 32 and H >= 256"
    return [title, _GROUP_HEADER, *lines] if lines else []


def thread_summary(records: list[Record]) -> list[str]:
    """Speed of fastrnn at more threads over its speed at one, shapes of B >= 8."""
    good = [record for record in records if not record.problem]
    single = {(r.shape, r.mode): r.seconds[SUBJECT].median for r in good if r.threads == 1}
    lines = []
    for kind, mode, threads, group in groups(records):
        gains = {
            shape: single[shape.id, mode] / record.seconds[SUBJECT].median
            for shape, record in group
            if threads > 1 and shape.N >= 8 and (shape.id, mode) in single
        }
        if gains:
            lines.append(_group_row(kind, mode, threads, gains, ".2f"))
    title = f"{SUBJECT}'s gain over one thread, shapes of B >= 8"
    return [title, _GROUP_HEADER, *lines] if lines else []


def summary(records: list[Record]) -> str:
    """All that is said under the table."""
    problems = [record for record in records if record.problem]
    parts = [
        ratio_summary(records),
        loss_summary(records),
        peak_summary(records),
        thread_summary(records),
    ]
    if problems:
        lines = [f"{r.shape} {r.mode} {r.threads}: {r.problem}" for r in problems]
        parts.append([f"{len(problems)} without a figure", *lines])
    return "\n\n".join("\n".join(part) for part in parts if part)


def write_run(path: Path, command: str, about: dict[str, Any], **results: Any) -> None:
    """Writes a run as JSON, in a folder that need not exist: how it was made, then its results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": command, **about, "torch": torch.__version__, **results}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_results(folder: Path, name: str, **results: Any) -> None:
    """Writes what benchmarks/NAME.py measured in this process as NAME.json."""
    command = shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
    write_run(folder / f"{name}.json", command, {"machine": machine()}, **results)


def save(path: Path, records: list[Record], command: str, about: dict[str, Any]) -> None:
    """Writes a run as JSON: how it was made, then a list of records."""
    write_run(path, command, about, records=[asdict(record) for record in records])


def load(path: Path) -> list[Record]:
    """Reads the records of a run that save wrote."""
    records = []
    for entry in json.loads(path.read_text())["records"]:
        for key in ("seconds", "ratios"):
            entry[key] = {name: Spread(**spread) for name, spread in entry[key].items()}
        records.append(Record(**entry))
    return records
