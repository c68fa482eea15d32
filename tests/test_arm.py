"""The kernels compiled for 64-bit Arm (NEON) and run under emulation, against plain loops."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
CASES = 60
pytestmark = pytest.mark.skipif(
    not COMPILER or not EMULATOR,
    reason="no aarch64-linux-gnu-g++ or qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels and tests/sanitize/main.cpp, which calls them without torch."""
    out = tmp_path_factory.mktemp("arm")
    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/sanitize/main.cpp"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread"]
    command = [COMPILER, *flags, "-static", *map(str, sources), "-o", str(out / "program")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out / "program"


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_kernels_on_arm(program: Path, dtype: str) -> None:
    command = [EMULATOR, str(program), "baseline", dtype, "--first", "0", "--count", str(CASES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.split()[-1] == str(CASES - 1)  # the last seed was reached


def test_a_wrong_value_is_seen_on_arm(program: Path) -> None:
    command = [EMULATOR, str(program), "baseline", "float32", "--first", "0", "--count", "240"]
    result = subprocess.run([*command, "--plant", "value"], capture_output=True, text=True)
    assert result.returncode == 1
    assert " differs by " in result.stdout + result.stderr
