"""Builds the whole extension with a CUDA build of torch, and uses it where there is no GPU.

Makes build/cuda-venv (some 6 GB), installs fastrnn there with FASTRNN_CUDA=1, runs link_checks.py
and some of the suite's tests of the CPU kernels. Skipped, with the reason, where there is no
toolkit of the release, or the disk is short.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VENV = ROOT / "build" / "cuda-venv"
TORCH = "2.14.1"  # whose wheel for Linux is a build for CUDA 13.0
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda-13.0"))
NEEDED_GB = 12
CPU_TESTS = ["test_parity.py", "test_packed.py", "test_build.py"]


def run(*command: str, cwd: Path = ROOT, **settings: str) -> None:
    """Runs a command; the gate stops where it fails."""
    subprocess.run(command, cwd=cwd, env=os.environ | settings, check=True)


def reason_to_skip() -> str | None:
    """Returns why the gate cannot run here, or None."""
    if not (TOOLKIT / "bin" / "nvcc").exists():
        return f"no CUDA toolkit in {TOOLKIT}: set CUDA_HOME to one of release 13"
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDED_GB and not VENV.exists():
        return f"the disk has {free:.0f} GB free, and an environment with CUDA takes {NEEDED_GB}"
    return None


def main() -> int:
    """Runs the gate; returns the exit code."""
    if reason := reason_to_skip():
        print(f"skipped: {reason}")
        return 0
    python = str(VENV / "bin" / "python")
    if not VENV.exists():
        run(sys.executable, "-m", "venv", str(VENV))
    packages = [f"torch=={TORCH}", "numpy", "ninja", "pybind11", "setuptools", "wheel"]
    run(python, "-m", "pip", "install", "-q", *packages, "pytest", "hypothesis")
    build = ["install", "-q", "--no-build-isolation", "--no-deps", "--force-reinstall", "."]
    settings = {"FASTRNN_CUDA": "1", "CUDA_HOME": str(TOOLKIT), "MAX_JOBS": "1"}
    settings["TORCH_CUDA_ARCH_LIST"] = "9.0"  # one links as all would
    # The environment's ninja comes first on PATH.
    path = os.pathsep.join([str(VENV / "bin"), os.environ["PATH"]])
    run(python, "-m", "pip", *build, PATH=path, **settings)
    run(python, str(HERE / "link_checks.py"), cwd=VENV)
    # From a copy, next to which no other fastrnn lies.
    tests = VENV / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("cuda", "__pycache__"))
    shutil.copy(ROOT / "setup.py", VENV)
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CPU_TESTS, cwd=tests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
