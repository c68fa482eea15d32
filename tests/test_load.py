"""On a machine without an idle core everything ends, with the bits of a single thread."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from helpers import run_tests


@pytest.fixture
def every_core_busy() -> Iterator[None]:
    """Keeps each core busy with another process."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in os.sched_getaffinity(0)
    ]
    try:
        yield
        assert all(process.poll() is None for process in spinning)
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("every_core_busy")
def test_threads_on_a_busy_machine() -> None:
    run_tests("test_threads.py", "-k", "f32 and not matches_torch")
