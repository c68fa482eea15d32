"""Times fastrnn against torch.nn over the grid of grid.py. See README.md beside this file."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import warnings
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

import fastrnn
import guard
import trees
from fastrnn.bench.arguments import rate, seconds, thread_counts
from fastrnn.bench.machine import machine
from fastrnn.bench.shapes import Shape
from fastrnn.bench.work import SUBJECT
from implementations import IMPLEMENTATIONS
from measure import Record, measure
from peak import Peak, measured_peak
from plot import draw, draw_overview
from report import header, row, save, summary, write_run
from selection import add_options, add_out, choose_modes, choose_shapes


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Time fastrnn against torch.nn, alternately, in one process.",
    )
    add_options(parser)
    add = parser.add_argument
    add("--threads", type=thread_counts, metavar="1,2", help="default: 1, and 2 if there are two")
    precisions = ("highest", "high", "medium")
    add("--precision", choices=precisions, default="highest", help="of float32 matrix products")
    add("--base", metavar="REV", help="compare with fastrnn at this commit instead of torch.nn")
    add("--list", action="store_true", help="print the ids and stop")
    add("--peers", action="store_true", help="time ONNX Runtime and OpenVINO too")
    add_out(parser)
    spent = "per row; default 1.2, or 0.4 with --quick"
    add("--seconds", type=seconds, metavar="S", help=spent)
    add("--peak-gflops", type=rate, metavar="X", help="f32 FMA peak of a core, if known")
    arguments = parser.parse_args(argv)
    if arguments.base and arguments.peers:
        parser.error("--base compares fastrnn with itself, --peers with others: one at a time")
    if arguments.base and arguments.precision != "highest":
        parser.error("--base compares at the highest precision")
    if arguments.threads is None:
        arguments.threads = [1] if len(os.sched_getaffinity(0)) == 1 else [1, 2]
    if arguments.seconds is None:
        arguments.seconds = 0.4 if arguments.quick else 1.2
    return arguments


def add_peers() -> dict[str, str]:
    """Registers the peers; returns their versions."""
    try:
        import peers

        versions = peers.versions()
    except ImportError as error:
        sys.exit(f"--peers needs more packages: pip install onnx onnxruntime openvino ({error})")
    IMPLEMENTATIONS.update(peers.PEERS)
    return versions


def measure_all(shapes: list[Shape], arguments: argparse.Namespace, peak: Peak) -> list[Record]:
    """Measures every shape, showing each as it comes. An interrupt keeps what is there."""
    modes = choose_modes(arguments)
    # Threads outermost: the pool is resized only once for each count.
    jobs = [(shape, mode, n) for n in arguments.threads for mode in modes for shape in shapes]
    records: list[Record] = []
    names = list(IMPLEMENTATIONS)
    print(header(names))
    try:
        with tqdm(jobs, unit="row", leave=False, disable=None) as progress:
            for shape, mode, threads in progress:
                progress.set_postfix_str(f"{shape.id} {mode} {threads}")
                record = measure(shape, mode, threads, arguments.seconds, peak)
                records.append(record)
                progress.write(row(record, names))
    except KeyboardInterrupt:
        print(f"interrupted after {len(records)} of {len(jobs)}")
    return records


def compare_with_base(shapes: list[Shape], arguments: argparse.Namespace, command: str) -> int:
    """Compares with the commit --base; writes guard.json.

    Returns:
        1 if some shape lost beyond noise or has no figure, 2 if the commit cannot be built or run,
        else 0.
    """
    modes = choose_modes(arguments)
    jobs = [(shape.id, mode, n) for n in arguments.threads for mode in modes for shape in shapes]
    try:
        tree = trees.prepare(arguments.base)
        found = guard.compare_all(jobs, tree, arguments.seconds)
    except (trees.TreeError, guard.WorkerError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{guard.summary(found)}")
    write_run(
        arguments.out / "guard.json",
        command,
        {"machine": machine()},
        base=tree.name,
        rows=[asdict(one) for one in found],
    )
    return int(not guard.passes(found))


def main() -> int:
    """Runs the benchmark.

    Returns:
        1 if some shape has no figure (wrong results, or an exception), or lost to --base; else 0.
    """
    arguments = parse_arguments()
    shapes = choose_shapes(arguments)
    if arguments.list:
        print("\n".join(shape.id for shape in shapes))
        return 0
    if not shapes:
        print(f"no shape matches {arguments.filter!r}; --list shows all", file=sys.stderr)
        return 2
    command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log can be followed
    if arguments.base:
        return compare_with_base(shapes, arguments, command)
    torch.set_float32_matmul_precision(arguments.precision)
    about: dict[str, Any] = {
        "machine": machine(),
        "build_info": fastrnn.build_info(),
        "precision": arguments.precision,
    }
    if arguments.peers:
        about["peers"] = add_peers()
    # torch.nn says this once of every projected LSTM; it is what the shape is there to show.
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    given = arguments.peak_gflops
    peak = measured_peak() if given is None else Peak.given(given)
    title = f"{about['machine']['processor']}, torch {torch.__version__}"
    if arguments.precision != "highest":
        title += f", float32 products in {arguments.precision} precision"
    print(
        f"{title}\nFMA peak of a core: f32 {peak.f32():.0f}, f64 {peak.f64():.0f} ({peak.source})"
    )

    records = measure_all(shapes, arguments, peak)
    print(f"\n{summary(records)}")
    save(arguments.out / "results.json", records, command, about | {"peak": peak.source})
    for name in IMPLEMENTATIONS:
        if name != SUBJECT:
            draw(arguments.out / f"ratio-{name}.png", {SUBJECT: records}, name, title)
            draw_overview(arguments.out / f"overview-{name}.png", records, name, title)
    print(f"\nwritten: {arguments.out}")
    return int(any(record.problem for record in records))


if __name__ == "__main__":
    sys.exit(main())
