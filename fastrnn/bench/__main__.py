"""Times a shape of your own: fastrnn, torch.nn, and torch.nn under torch.compile, in turn."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

import fastrnn
from fastrnn.bench.arguments import file, picture_problem, positive, seconds, thread_counts
from fastrnn.bench.machine import machine
from fastrnn.bench.measure import MODES, Measurement, measure
from fastrnn.bench.report import as_json, draw, sentence, table
from fastrnn.bench.shapes import Shape
from fastrnn.bench.work import MODULES, SUBJECT, Build, Step, Workload, build_compiled

KINDS = ("lstm", "rnn", "rnn-relu")  # as shape ids have them
DTYPES = ("f32", "f64", "bf16", "f16")
COMPILED = "torch.compile"
READING = (
    'In the table "over fastrnn" is the time of a call over that of fastrnn: above 1, fastrnn is '
    "faster. Times and ratios are medians over rounds, and q1..q3 their quartiles: the wider apart "
    "they are, the less the median says. Use an idle machine."
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with status 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn.bench", description=__doc__, epilog=READING
    )
    add = parser.add_argument
    add("--kind", choices=KINDS, default="lstm", help="rnn is the one with tanh; default lstm")
    for name, default, what in (
        ("batch", 1, "sequences in a call"),
        ("seq", 100, "time steps"),
        ("input", 64, "input features"),
        ("hidden", 64, "hidden units"),
        ("layers", 1, "stacked layers"),
    ):
        text = f"{what}; default {default}"
        add(f"--{name}", type=positive, default=default, metavar="N", help=text)
    add("--bidirectional", action="store_true", help="both directions")
    add("--dtype", choices=DTYPES, default="f32", help="default f32")
    add("--mode", choices=MODES, default="inference", help="default inference")
    threads = "thread counts, with commas; default: as many as torch uses"
    add("--threads", type=thread_counts, metavar="N,N", help=threads)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--seconds", type=seconds, default=3.0, metavar="S", help="per thread count; default 3")
    limit = "time that torch.compile may take to compile; default 60"
    add("--compile-limit", type=seconds, default=60.0, metavar="S", help=limit)
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--json", type=file, metavar="FILE", help="write the figures as JSON")
    add("--plot", type=file, metavar="FILE", help="draw the figures (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if arguments.device == "cuda" and fastrnn.build_info()["cuda"] is None:
        parser.error("--device cuda: fastrnn is built without CUDA; build it with FASTRNN_CUDA=1")
    if arguments.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if arguments.plot and (problem := picture_problem(arguments.plot)):
        parser.error(f"--plot {problem}")
    if arguments.threads is None:
        arguments.threads = [torch.get_num_threads()]
    return arguments


def make_shape(arguments: argparse.Namespace) -> Shape:
    """The shape that was asked for."""
    text = f"{arguments.kind}-B{arguments.batch}-T{arguments.seq}"
    text += f"-I{arguments.input}-H{arguments.hidden}"
    text += f"-L{arguments.layers}" * (arguments.layers > 1) + "-bi" * arguments.bidirectional
    return Shape.parse(text + f"-{arguments.dtype}" * (arguments.dtype != "f32"))


def choose_builds(arguments: argparse.Namespace) -> dict[str, Build]:
    """What is timed; fastrnn last, under the ones that it is held against."""
    builds = {name: build for name, build in MODULES.items() if name != SUBJECT}
    limit: float = arguments.compile_limit

    def build(work: Workload) -> Step:
        print(f"compiling torch.nn's module, for {limit:g} s at most", file=sys.stderr)
        return build_compiled(work, limit)

    if not arguments.no_compile:
        builds[COMPILED] = build
    return builds | {SUBJECT: MODULES[SUBJECT]}


def choose_progress() -> Callable[[Iterable[int]], Iterable[int]]:
    """A bar over the rounds where tqdm is installed, else nothing."""
    if find_spec("tqdm") is None:
        return iter
    from tqdm import tqdm

    return partial(tqdm, unit="round", leave=False)


def describe(arguments: argparse.Namespace) -> str:
    """The shape in words."""
    words = f"{arguments.kind}, batch {arguments.batch}, {arguments.seq} steps, "
    words += f"input {arguments.input}, hidden {arguments.hidden}"
    words += f", {arguments.layers} layers" * (arguments.layers > 1)
    words += ", bidirectional" * arguments.bidirectional
    return f"{words}, {arguments.dtype}, {arguments.mode} on {arguments.device}"


def caution(cores: int, load: float, threads: int) -> str:
    """Why figures taken now may mislead, in a sentence; nothing if they should not."""
    if threads > cores:
        return f"{threads} threads share {cores} cores here: the figures say little."
    if load + threads > cores + 1:
        return (
            f"Load in the last minute was {load:.1f}, on {cores} cores: while other work runs, "
            "the figures say little, above all those on several threads."
        )
    return ""


def lacks_memory(error: RuntimeError) -> bool:
    """Whether torch raised this because tensors of the shape do not fit."""
    signs = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in signs)


def _where(arguments: argparse.Namespace, found: Measurement) -> str:
    if arguments.device != "cpu":
        return "on this device"
    return f"on {found.threads} thread{'s' * (found.threads > 1)}"


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and writes what was asked for.

    Returns:
        1 if fastrnn or torch.nn has no figure, else 0.
    """
    arguments = parse_arguments(argv)
    shape, builds = make_shape(arguments), choose_builds(arguments)
    about: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "fastrnn.bench", *(argv or sys.argv[1:])]),
        "shape": {
            **{k: getattr(arguments, k) for k in ("kind", "batch", "seq", "input", "hidden")},
            **{k: getattr(arguments, k) for k in ("layers", "bidirectional", "dtype")},
        },
        "mode": arguments.mode,
        "device": arguments.device,
        "machine": machine(),
        "torch": str(torch.__version__),
        "build_info": fastrnn.build_info(),
    }
    if arguments.device == "cuda":
        about["machine"]["cuda_device"] = torch.cuda.get_device_name()
    on = about["machine"].get("cuda_device", about["machine"]["processor"])
    print(f"{describe(arguments)}\n{on}, torch {torch.__version__}, fastrnn {fastrnn.__version__}")
    load = about["machine"]["load_average"]
    if said := caution(about["machine"]["cores"], load, max(arguments.threads)):
        print(said)

    measurements: list[Measurement] = []
    for threads in arguments.threads:
        try:
            found = measure(
                shape,
                arguments.mode,
                threads,
                arguments.seconds,
                builds,
                arguments.device,
                choose_progress(),
            )
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            print("This shape needs more memory than there is.", file=sys.stderr)
            return 1
        measurements.append(found)
    sentences = [sentence(found.ratios, _where(arguments, found)) for found in measurements]
    print(f"\n{table(measurements, list(builds))}\n")
    print(*sentences, sep="\n")
    if arguments.json:
        content = as_json(about, measurements, sentences)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.plot:
        draw(arguments.plot, measurements, list(builds), describe(arguments))
    return int(not all(found.ratios for found in measurements))


if __name__ == "__main__":
    sys.exit(main())
