"""Drives the kernels under sanitizers, and shows that these see planted faults. See main.cpp.

Three programs are built in build/sanitize: one with AddressSanitizer and UBSan, one with
ThreadSanitizer, and one of the very objects that the extension module is made of, whose arrays end
where a page that cannot be touched begins.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize"
DTYPES = ["float32", "float64", "float16", "bfloat16"]
# high and medium: float32 whose products are computed from less.
ONLY_DTYPES = {
    "avx512_bf16": ["bfloat16", "medium"],
    "amx": ["float16", "bfloat16", "high", "medium"],
    "amx_fp16": ["float16"],
}
UNSUPPORTED = 77  # the exit status where the processor lacks the instruction set

# Each program's flags, and how many cases it is given for each instruction set and dtype.
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
    "shipped": "",
}
CASES = {"address": 150, "thread": 60, "shipped": 400}

# Arrays of main.cpp, one element too short in turn.
FORWARD_ARRAYS = (
    "x h0 c0 w_ih w_hh b_ih b_hh w_hr packed_ih packed_hh bias packed_w_hr h h_n c_n c gates c_all"
)
BACKWARD_ARRAYS = (
    "dy dh dc dgates dprojected columns_w_hh row_scratch columns_w_hr dx dw_ih dw_hh db"
)
OTHER_ARRAYS = "scratch unprojected dw_hr outer_scratch dw_ih_result dw_hh_result dw_hr_result"
ARRAYS = f"{FORWARD_ARRAYS} {BACKWARD_ARRAYS} {OTHER_ARRAYS}".split(" ")
# Only where elements are not the type that is computed in: else c is c_n, and sums are results.
ARRAYS_16_BIT = ("c", "dw_ih_result", "dw_hh_result", "dw_hr_result")
REPORTING = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
# Cases among which one shows a planted fault. On a busy machine threads meet seldom: a fault of
# theirs is looked for in more.
PLANTED_CASES = 240
PLANTED_TRIES = {"address": 1, "thread": 4, "shipped": 1}


class NotRunError(Exception):
    """The processor lacks the instruction set of a run."""


@dataclass(frozen=True)
class Run:
    """One run of a program."""

    program: str
    isa: str
    dtype: str
    first: int
    count: int
    fault: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.program, self.isa, self.dtype, self.fault]))

    def execute(self) -> tuple[int, str]:
        """Returns the exit status and what was printed.

        Raises:
            NotRunError: The processor lacks the instruction set.
        """
        arguments = [self.isa, self.dtype, "--first", str(self.first), "--count", str(self.count)]
        if self.fault:
            arguments += ["--plant", self.fault]
        result = subprocess.run(
            [BUILD / self.program / "program", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | REPORTING,
            check=False,
        )
        if result.returncode == UNSUPPORTED:
            raise NotRunError
        return result.returncode, result.stdout + result.stderr


def read_setup() -> dict[str, Any]:
    """Returns setup.py's names: its lists of kernels and flags are the ones to follow."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    with mock.patch.object(sys, "argv", ["setup.py", "--version"]), quiet:
        return runpy.run_path(str(ROOT / "setup.py"))


def write_ninja(setup: dict[str, Any]) -> None:
    """Writes how the three programs are built."""
    flags = "-std=c++17 -O1 -g1 -fno-omit-frame-pointer -Wall -Wextra -pthread"
    kernel_flags = "-ffp-contract=off -fno-exceptions -fno-rtti"
    x86 = "-DFASTRNN_X86" if setup["X86"] else ""
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {flags} {x86}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -pthread $more $in -o $out",
    ]

    def add_object(program: str, source: str, directory: str, more: str) -> str:
        target = f"{program}/{directory}{Path(source).stem}.o"
        lines.append(f"build {target}: compile {ROOT / source}")
        lines.append(f"  more = {SANITIZERS[program]} {more}")
        return target

    for program, sanitizer in SANITIZERS.items():
        objects = [
            add_object(program, source, "", "-fno-sanitize=undefined" if sanitizer else "")
            for source in ("tests/sanitize/main.cpp", "csrc/cpu/dispatch.cpp")
        ]
        for isa, isa_flags in setup["ISA_FLAGS"].items():
            if program == "shipped":
                objects += shipped_objects(isa, setup["KERNELS"])
                continue
            more = " ".join([kernel_flags, *isa_flags])
            objects += [add_object(program, source, f"{isa}/", more) for source in setup["KERNELS"]]
        lines += [f"build {program}/program: link {' '.join(objects)}", f"  more = {sanitizer}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")


def shipped_objects(isa: str, kernels: Iterable[str]) -> list[str]:
    """Returns the objects of one instruction set that `make build` left."""
    folder = ROOT / "build" / f"temp.torch-{importlib.metadata.version('torch')}" / isa
    found = [list(folder.rglob(f"{Path(kernel).stem}.o")) for kernel in kernels]
    assert all(len(paths) == 1 for paths in found), f"run `make build`: {folder} holds {found}"
    return [str(paths[0]) for paths in found]


def check_clean(run: Run) -> str | None:
    """Returns what is wrong with a run that should find nothing."""
    status, text = run.execute()
    return None if status == 0 else f"{run}: exit status {status}\n{text[-4000:]}"


def check_planted(run: Run) -> str | None:
    """Returns what is wrong with a run that should find a planted fault, and in the kernels."""
    for attempt in range(PLANTED_TRIES[run.program]):
        status, text = replace(run, first=attempt * run.count).execute()
        if sees_planted(run, status, text):
            return None
    return f"{run}: not seen, exit status {status}\n{text[-2000:]}"


def sees_planted(run: Run, status: int, text: str) -> bool:
    """Returns whether an exit status and what was printed are those of the planted fault."""
    if run.fault == "value":
        return status == 1 and " differs by " in text
    if run.program == "shipped":
        return status < 0  # killed by the processor's refusal
    report = {
        "overflow": r"csrc/cpu/.*runtime error: signed integer overflow",
        "barrier": r"ThreadSanitizer: data race",
        "overlap": r"ThreadSanitizer: data race",
        "ahead": r"ThreadSanitizer: data race",
    }.get(run.fault, r"ERROR: AddressSanitizer: ")
    return status != 0 and bool(re.search(report, text)) and f"fastrnn::{run.isa}::" in text


def execute_all(title: str, check: Callable[[Run], str | None], runs: list[Run]) -> bool:
    """Runs `check` on each, as many at a time as there are processors; prints what is wrong."""
    start = time.monotonic()
    left_out: list[Run] = []

    def check_if_possible(run: Run) -> str | None:
        try:
            return check(run)
        except NotRunError:
            left_out.append(run)
            return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wrong = [message for message in pool.map(check_if_possible, runs) if message]
    done = len(runs) - len(left_out)
    print(f"{title}: {done} runs, {len(wrong)} wrong, {time.monotonic() - start:.0f} s")
    if left_out:
        sets = ", ".join(sorted({run.isa for run in left_out}))
        print(f"{title}: {len(left_out)} not run, as this processor has no {sets}")
    print("\n".join(wrong[:5]), flush=True)
    return not wrong


def main() -> int:
    """Builds and runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--times", type=int, default=1, help="as many cases")
    options = parser.parse_args()
    start = time.monotonic()
    setup = read_setup()
    write_ninja(setup)
    subprocess.run([Path(sys.executable).with_name("ninja"), "-C", BUILD, "--quiet"], check=True)
    print(f"build: {time.monotonic() - start:.0f} s", flush=True)
    pairs = [(isa, dtype) for isa in setup["ISA_FLAGS"] for dtype in ONLY_DTYPES.get(isa, DTYPES)]
    good = True
    for program, count in CASES.items():
        runs = [
            Run(program, isa, dtype, options.first, count * options.times) for isa, dtype in pairs
        ]
        good &= execute_all(program, check_clean, runs)
    faults = {
        "address": [*ARRAYS, "overflow", "value"],
        "thread": ["barrier", "overlap", "ahead"],
        "shipped": ARRAYS,
    }
    for program, names in faults.items():
        runs = [
            Run(program, isa, dtype, 0, PLANTED_CASES, fault)
            for isa, dtype in pairs
            for fault in names
            if fault not in ARRAYS_16_BIT or dtype.endswith("16")
            if program != "address" or dtype in ("float32", "bfloat16")  # it takes time to report
        ]
        good &= execute_all(f"{program}, faults planted", check_planted, runs)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
