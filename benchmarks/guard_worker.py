"""Times the fastrnn that PYTHONPATH names, a slice at a time, when guard.py asks over a pipe.

A request is a line of JSON: {"shape": ID, "mode": MODE, "threads": N} builds and checks, and
{"calls": N} times; the answer is a line too: {"seconds": a call's} or {"problem": why not}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastrnn

# What times is this tree's on both sides, so that fastrnn alone differs.
_HARNESS = str(Path(__file__).resolve().parents[1] / "fastrnn")
fastrnn.__path__.insert(0, _HARNESS)

from fastrnn.bench.check import mismatches  # noqa: E402
from fastrnn.bench.measure import describe  # noqa: E402
from fastrnn.bench.shapes import Shape  # noqa: E402
from fastrnn.bench.timing import cpu_timer, settle  # noqa: E402
from fastrnn.bench.work import MODULES, REFERENCE, SUBJECT, make_workload  # noqa: E402

fastrnn.__path__.remove(_HARNESS)


class Subject:
    """The shape that is being timed."""

    def __init__(self) -> None:
        self._inference = False
        self._timer: Callable[[int], float] | None = None

    def build(self, shape: str, mode: str, threads: int) -> None:
        """Makes the module and compares its results with torch.nn's.

        Raises:
            ArithmeticError: they differ.
        """
        torch.set_num_threads(threads)
        self._inference = mode == "inference"
        with torch.inference_mode(self._inference):
            work = make_workload(Shape.parse(shape), mode)
            steps = {name: build(work) for name, build in MODULES.items()}
            subject, reference = steps[SUBJECT], steps[REFERENCE]
            assert subject is not None and reference is not None
            if wrong := mismatches(subject.results(), reference.results()):
                raise ArithmeticError("; ".join(wrong))
        self._timer = cpu_timer(subject.run, threads)

    def seconds_a_call(self, calls: int) -> float:
        """Times a slice; its threads are at rest again when this returns."""
        assert self._timer is not None
        with torch.inference_mode(self._inference):
            seconds = self._timer(calls)
        settle()
        return seconds


def answer(subject: Subject, request: dict[str, Any]) -> dict[str, Any]:
    """Does what a request says."""
    try:
        if "calls" in request:
            return {"seconds": subject.seconds_a_call(request["calls"])}
        subject.build(**request)
        settle()
    except Exception as error:
        return {"problem": describe(error)}
    return {}


def main() -> None:
    """Answers until the pipe closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed must not get between the answers
    print(json.dumps({"fastrnn": fastrnn.__file__}), file=answers)
    subject = Subject()
    for line in sys.stdin:
        print(json.dumps(answer(subject, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
