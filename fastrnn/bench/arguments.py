"""What the options of the command lines take: types for argparse, with a message each."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def thread_counts(text: str) -> list[int]:
    """Such numbers, with commas between them."""
    return [positive(part) for part in text.split(",")]


def _between(text: str, limit: float, what: str) -> float:
    """A number above 0 and below `limit`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < limit:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def seconds(text: str) -> float:
    """A time in seconds, less than a day."""
    return _between(text, 86400, "a time in seconds")


def rate(text: str) -> float:
    """A number above 0."""
    return _between(text, float("inf"), "a number above 0")


def file(text: str) -> Path:
    """A file to write, in a folder that exists."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def picture_problem(path: Path) -> str | None:
    """Why matplotlib, which must be installed, cannot write that file, in words; None if it can."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    # Without a suffix matplotlib adds its own.
    if path.suffix and path.suffix[1:].lower() not in kinds:
        return f"{path}: matplotlib writes {', '.join(sorted(kinds))}"
    return None
