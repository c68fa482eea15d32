"""How setup.py stops where it cannot build, and what it says that it builds."""

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import run_python

SETUP = Path(__file__).parent.parent / "setup.py"


def run_setup(prelude: str = "pass", **env: str) -> str:
    """Returns the sentence with which setup.py, which is not to get far, ends."""
    code = (
        f"import runpy, sys; {prelude}; "
        f"sys.argv = ['setup.py', 'build_ext']; runpy.run_path({str(SETUP)!r}, run_name='__main__')"
    )
    result = run_python("-c", code, **env)
    assert result.returncode != 0
    (message,) = result.stderr.strip().splitlines()
    return message


def test_build_without_torch() -> None:
    message = run_setup("sys.modules['torch'] = None")
    assert "pip install torch" in message and "--no-build-isolation" in message


def test_build_with_a_torch_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: no file')")
    message = run_setup(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert message == (
        "fastrnn compiles against torch, which does not import: libcudart.so.13: no file"
    )


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.1"])
def test_build_with_an_old_torch(version: str) -> None:
    message = run_setup(f"import torch; torch.__version__ = {version!r}")
    assert message == f"fastrnn needs torch 2.10 or newer, and torch {version} is installed"


def make_compiler(folder: Path, version: str) -> str:
    """Returns the path of a program that says of itself what a compiler would."""
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\necho '{version}'\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_build_with_clang(tmp_path: Path) -> None:
    message = run_setup(CXX=make_compiler(tmp_path, "Debian clang version 19.1.7"))
    assert message.startswith("fastrnn needs g++") and "Debian clang version 19" in message


@pytest.mark.parametrize(
    "version",
    [
        "c++ (Debian 10.2.1-6) 10.2.1 20210110",
        "g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-28)",
        "g++ (Ubuntu 9.4.0-1ubuntu1~20.04.2) 9.4.0",
    ],
)
def test_build_with_an_old_compiler(version: str, tmp_path: Path) -> None:
    message = run_setup(CXX=make_compiler(tmp_path, version))
    assert message.startswith("fastrnn needs g++ 11 or newer") and message.endswith(version)


def test_build_without_compiler() -> None:
    message = run_setup(CXX="/nowhere/g++ -pipe")
    assert message.startswith("fastrnn needs g++ (set CXX): ") and "/nowhere/g++" in message


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit(tmp_path: Path) -> None:
    """What is built is named, and that it was changed; but not by a repository around it."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def built(folder: Path) -> str:
        show = "import runpy, setuptools; setuptools.setup = lambda **arguments: None; "
        show += f"print(runpy.run_path({str(folder / 'setup.py')!r})['COMMIT'])"
        return run_python("-c", show, FASTRNN_CUDA="0").stdout.strip()

    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        for folder in (tmp_path, unpacked):
            shutil.copy(SETUP.with_name(name), folder)
    assert built(tmp_path) == "None"
    git("init")
    git("add", "setup.py", "pyproject.toml")
    git("commit", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert built(tmp_path) == commit
    assert built(unpacked) == "None"
    git("tag", "-a", "v1", "-m", "a release")
    (tmp_path / "setup.py").open("a").write("# changed\n")
    assert built(tmp_path) == f"{commit}-dirty"
