"""The modules on the CUDA path, from Python to the emulated kernels: the suite's own tests of
values, run again in a process whose CPU kernels are replaced (see emulated.py).

Left out: what is bitwise on the CPU alone, what counts the CPU's kernels, and float32's rounding in
products over thousands of rows, which a library computes there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import run_tests

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the emulator's fibers need x86-64 and g++",
)

HERE = Path(__file__).parent
VALUES = [
    "test_parity.py",
    "test_packed.py::test_matches_torch",
    "test_gradients.py",
    "test_random.py",
    "test_truth.py::test_float32_does_not_drift[LSTM]",
]
# What lies above the kernels, so that one path shows it.
ABOVE = [
    "test_dropout.py",
    "test_cells.py",
    "test_double_backward.py",
    "test_autocast.py",
    "test_bad_input.py::test_memory_that_was_freed",
    "test_bad_input.py::test_memory_that_was_freed_before_the_backward_pass",
    "test_output_in_place.py::test_gradients_are_torchs",
    "test_samples.py::test_values",
]
COUNTING = "not test_a_step_is_one_fused_call and not test_first_gradients_are_one_fused_call"


PYTHON_PATH = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])


# However long that takes: run_tests stops what seems to hang.
@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """Builds what is loaded in the processes below."""
    command = [sys.executable, "-c", "import emulated"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": PYTHON_PATH}, check=True)


def run_emulated(*tests: str, **settings: str) -> None:
    """Runs tests in a process where the CUDA kernels are emulated."""
    run_tests("-p", "emulated", *tests, PYTHONPATH=PYTHON_PATH, **settings)


@pytest.mark.parametrize("path", ["persistent", "stepwise"])
def test_values(path: str) -> None:
    run_emulated(*VALUES, FASTRNN_CUDA_PATH=path)


def test_above() -> None:
    run_emulated(*ABOVE, "-k", COUNTING)


@pytest.mark.parametrize("path", ["persistent", "stepwise"])
def test_half_types(path: str) -> None:
    run_emulated("cuda/half_checks.py", FASTRNN_CUDA_PATH=path)


@pytest.mark.parametrize("sms", ["132", "4"])
def test_paths(sms: str) -> None:
    run_emulated("cuda/path_checks.py", "-k", "not unfit", FASTRNN_EMULATED_SMS=sms)


# Too old, or without code: for other architectures (209, 98), or as PTX that is too new for its
# driver (222), for which that has no compiler (221), or may not use it (223).
@pytest.mark.parametrize(
    "setting", ["CAPABILITY=75", *(f"LOAD_ERROR={error}" for error in (209, 98, 221, 222, 223))]
)
def test_unfit_device(setting: str) -> None:
    name, value = setting.split("=")
    run_emulated("cuda/path_checks.py", "-k", "unfit", **{f"FASTRNN_EMULATED_{name}": value})


# As far as they need no GPU.
def test_gpu_tests() -> None:
    run_emulated("test_cuda.py", FASTRNN_TEST_DEVICE="cpu")
