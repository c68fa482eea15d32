"""What calls notice of the cores they run on: other work (csrc/contention.h), and how far apart
they lie (csrc/distance.h)."""

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

SOURCES = ["tests/cores.cpp", "csrc/contention.cpp", "csrc/distance.cpp"]
EXPECTED = {
    "one_loss": 0,
    "losses_in_a_row": 1,
    "losses_apart": 0,
    "one_call_on_one_core": 0,  # it only started there
    "short_calls_on_one_core": 1,
    "losses_on_one_core": 1,
    "calls_that_heed_distance": 16,
}


def test_cores(tmp_path: Path) -> None:
    """On a busy machine a loss that is to be alone may have company, so there are three tries."""
    program = tmp_path / "cores"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, "-std=c++17", "-O1", "-pthread", *SOURCES, "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)
    for _ in range(3):
        output = subprocess.run([program], check=True, text=True, capture_output=True).stdout
        found = {name: int(value) for name, value in map(str.split, output.splitlines())}
        if found == EXPECTED:
            return
    assert found == EXPECTED
