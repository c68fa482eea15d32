"""Every CUDA kernel under the emulator: values, bounds, races; and planted faults are caught."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from builds import KERNELS, ROOT, build, run

GATE = Path(__file__).with_name("gate.cpp")
SCHEDULES = ["round_robin", "block_first", "warp_first", "random"]

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the emulator's fibers need x86-64 and g++",
)


def run_gate(variant: str, *arguments: object, **settings: object) -> subprocess.CompletedProcess:
    """Builds the gate of that variant and runs it."""
    program = build([GATE, *KERNELS], variant, extra=["-DFASTRNN_MUTANTS"])
    return run(program, *arguments, **settings)


def assert_clean(done: subprocess.CompletedProcess) -> None:
    """Asserts that a run found nothing, and said nothing but its seeds."""
    rest = [line for line in done.stderr.splitlines() if not re.fullmatch(r"seed \d+", line)]
    assert (done.returncode, rest) == (0, [])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values(schedule: str) -> None:
    assert_clean(run_gate("plain", 0, 400, schedule=schedule))


def test_values_of_large_weights() -> None:
    assert_clean(run_gate("plain", 0, 20, "large"))


def test_bounds() -> None:
    assert_clean(run_gate("asan", 1000, 100))
    assert_clean(run_gate("asan", 0, 4, "large"))


@pytest.mark.parametrize("schedule", ["round_robin", "random"])
def test_races(schedule: str) -> None:
    assert_clean(run_gate("tsan", 2000, 25, schedule=schedule))


# As a driver may compile what was built for an A100, on a GPU that has clusters.
def test_ptx_that_knows_no_clusters() -> None:
    program = build([GATE, *KERNELS], extra=["-DFASTRNN_MUTANTS", "-D__CUDA_ARCH__=800"])
    assert_clean(run(program, 0, 40))


def test_failed_launch_leaves_no_error_behind() -> None:
    done = run_gate("plain", "fail")
    assert (done.returncode, done.stdout) == (0, "cudaErrorInvalidValue\n")


def mutants() -> list[tuple[int, str]]:
    """Returns number and name of each planted fault in csrc/cuda/device.cuh."""
    text = (ROOT / "csrc" / "cuda" / "device.cuh").read_text(encoding="utf-8")
    names = re.search(r"enum class Mutant : int \{(.*?)\}", text, re.S)[1]
    return list(enumerate(name.strip() for name in names.split(",")))[1:]


# A missing barrier is a race under every schedule, a bound too far an access out of bounds; whether
# wrong numbers come of it is chance.
@pytest.mark.parametrize(("number", "name"), [pytest.param(*m, id=m[1]) for m in mutants()])
def test_mutant_is_caught(number: int, name: str) -> None:
    variant = "tsan" if "barrier" in name else "asan"
    done = run_gate(variant, 0, 40, f"mutant={number}")
    assert done.returncode != 0
    expected = "ThreadSanitizer: data race" if variant == "tsan" else "ERROR: AddressSanitizer"
    assert expected in done.stderr
