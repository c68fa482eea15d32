"""setup.py's choice between a build for the CPU and one with CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import run_python

SETUP = Path(__file__).parent.parent / "setup.py"


def choose(
    tmp_path: Path,
    wish: str,
    *,
    torch_cuda: str | None,
    toolkit: str | None,
    archs: str = "",
    headers: str = "include",
    show: str = "'CUDA ' + chosen['CUDA'] if chosen['CUDA'] else 'CPU'",
) -> str:
    """Returns what setup.py says of its choice: "CUDA 13.0", "CPU", or why it stops.

    torch_cuda: the CUDA that torch was built for; toolkit: the release that lies in CUDA_HOME;
    show: an expression to return instead, of what setup.py has `chosen` and done.
    """
    if toolkit:
        for folder in ("bin", headers):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / headers / "cuda_runtime.h").touch()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {toolkit}, V{toolkit}.1'\n"
        )
        nvcc.chmod(0o755)
    code = f"""
import os, runpy, sys, torch, setuptools
from torch.utils import cpp_extension
torch.version.cuda = {torch_cuda!r}
cpp_extension.CUDA_HOME = {str(tmp_path)!r} if {toolkit!r} else None
cpp_extension.CUDAExtension = cpp_extension.CppExtension
setuptools.setup = lambda **arguments: None
chosen = runpy.run_path({str(SETUP)!r})
print({show})
print([source for source in chosen["SOURCES"] if source.endswith(".cu")])
"""
    done = run_python("-c", code, FASTRNN_CUDA=wish, TORCH_CUDA_ARCH_LIST=archs)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    *notes, choice, sources = done.stdout.strip().splitlines()
    assert (sources == "[]") == (choice == "CPU")
    return " ".join([*notes, choice])


@pytest.mark.parametrize("wish", ["", "auto", "1"])
def test_builds_cuda_where_torch_and_toolkit_have_it(tmp_path: Path, wish: str) -> None:
    assert choose(tmp_path, wish, torch_cuda="13.0", toolkit="13.2") == "CUDA 13.2"


def test_toolkit_of_conda(tmp_path: Path) -> None:
    headers = "targets/x86_64-linux/include"
    said = choose(tmp_path, "1", torch_cuda="13.0", toolkit="13.0", headers=headers)
    assert said == "CUDA 13.0"


def test_builds_for_the_cpu_on_demand(tmp_path: Path) -> None:
    assert choose(tmp_path, "0", torch_cuda="13.0", toolkit="13.0") == "CPU"


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "reason"),
    [(None, "13.0", "built without CUDA"), ("13.0", None, "no CUDA toolkit was found")],
)
def test_something_missing(
    tmp_path: Path, torch_cuda: str | None, toolkit: str | None, reason: str
) -> None:
    said = choose(tmp_path, "auto", torch_cuda=torch_cuda, toolkit=toolkit)
    assert said.endswith("CPU") and reason in said


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "reason"),
    [(None, None, "built without CUDA"), ("13.0", None, "no CUDA toolkit was found")],
)
def test_something_missing_that_was_demanded(
    tmp_path: Path, torch_cuda: str | None, toolkit: str | None, reason: str
) -> None:
    said = choose(tmp_path, "1", torch_cuda=torch_cuda, toolkit=toolkit)
    assert said.startswith("FASTRNN_CUDA=1, but") and reason in said


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_another_major_release_stops(tmp_path: Path, wish: str) -> None:
    said = choose(tmp_path, wish, torch_cuda="13.0", toolkit="12.8")
    assert "is release 12.8" in said and "is built for CUDA 13.0" in said
    assert "FASTRNN_CUDA=0" in said


@pytest.mark.parametrize("archs", ["7.5", "Volta", "Pascal 7.0+PTX"])
def test_old_architectures(tmp_path: Path, archs: str) -> None:
    said = choose(tmp_path, "auto", torch_cuda="13.0", toolkit="13.0", archs=archs)
    assert f"is {archs}, but" in said and "8.0" in said and "FASTRNN_CUDA=0" in said


@pytest.mark.parametrize(
    ("archs", "old", "kept"),
    [
        ("7.5 8.0 9.0 12.0+PTX", "7.5", "8.0;9.0;12.0+PTX"),  # as a container may have it
        ("Pascal;7.0+PTX;Hopper", "Pascal, 7.0+PTX", "Hopper"),
    ],
)
def test_old_architectures_beside_others(tmp_path: Path, archs: str, old: str, kept: str) -> None:
    show = "os.environ['TORCH_CUDA_ARCH_LIST']"
    said = choose(tmp_path, "1", torch_cuda="13.0", toolkit="13.0", archs=archs, show=show)
    assert said == f"fastrnn: no CUDA kernels for {old}, where torch.nn computes {kept}"


@pytest.mark.parametrize(
    ("toolkit", "archs"),
    [("12.6", "8.0;9.0+PTX"), ("12.8", "8.0;9.0+PTX;10.0;12.0"), ("13.2", "8.0;9.0+PTX;10.0;12.0")],
)
def test_default_architectures(tmp_path: Path, toolkit: str, archs: str) -> None:
    show = "os.environ['TORCH_CUDA_ARCH_LIST']"
    assert choose(tmp_path, "1", torch_cuda=toolkit, toolkit=toolkit, show=show) == archs


@pytest.mark.parametrize("archs", ["native", "11.9"])
def test_architectures_that_are_not_known(tmp_path: Path, archs: str) -> None:
    said = choose(tmp_path, "1", torch_cuda="13.0", toolkit="13.0", archs=archs)
    assert said.startswith(f"torch does not understand TORCH_CUDA_ARCH_LIST={archs}: ")


@pytest.mark.parametrize("archs", ["10.0", "Ampere", "9.0a 12.0+PTX"])
def test_newer_architectures(tmp_path: Path, archs: str) -> None:
    said = choose(tmp_path, "1", torch_cuda="13.0", toolkit="13.0", archs=archs)
    assert said == "CUDA 13.0"


def test_wrong_wish(tmp_path: Path) -> None:
    said = choose(tmp_path, "yes", torch_cuda=None, toolkit=None)
    assert said == "FASTRNN_CUDA must be 0, 1 or auto, got 'yes'"
