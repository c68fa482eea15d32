"""Which shapes a run is about: the options that the runners share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fastrnn.bench.arguments import positive
from fastrnn.bench.measure import MODES
from fastrnn.bench.shapes import Shape
from grid import select
from random_shapes import draw_shapes


def shape_id(text: str) -> Shape:
    """A shape by its id: a type for argparse."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error
    return text


def add_options(parser: argparse.ArgumentParser, mode: str = "both") -> None:
    """Adds the options that choose shapes, and --mode with a default."""
    add = parser.add_argument
    add("--filter", type=_pattern, default="", metavar="REGEX", help="only ids matching this")
    only = "only this id, in the grid or not"
    add("--shape", type=shape_id, action="append", metavar="ID", help=only)
    add("--quick", action="store_true", help="a small part of the grid")
    add("--random", type=positive, metavar="N", help="N random shapes, instead of the grid")
    add("--seed", type=int, default=0, metavar="S", help="draws others; default 0")
    add("--mode", choices=(*MODES, "both"), default=mode, help=f"default {mode}")


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says where a run's files go."""
    default = Path(__file__).parent / "out"
    where = "where the files go; default benchmarks/out"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=where)


def choose_shapes(arguments: argparse.Namespace) -> list[Shape]:
    """The shapes named, drawn at random, or of the grid."""
    if arguments.shape:
        shapes = arguments.shape
    elif arguments.random is not None:
        shapes = draw_shapes(arguments.random, arguments.seed)
    else:
        return select(arguments.filter, arguments.quick)
    return [shape for shape in shapes if re.search(arguments.filter, shape.id)]


def choose_modes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The modes asked for."""
    return MODES if arguments.mode == "both" else (arguments.mode,)
