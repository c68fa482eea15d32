"""How setup.py stops where it cannot build, on a machine that has what it is built with."""

from pathlib import Path

from helpers import run_python


def run_setup(prelude: str = "pass", **env: str) -> str:
    """Returns the sentence with which setup.py, which is not to get far, ends."""
    setup = Path(__file__).parent.parent / "setup.py"
    code = (
        f"import runpy, sys; {prelude}; "
        f"sys.argv = ['setup.py', 'build_ext']; runpy.run_path({str(setup)!r}, run_name='__main__')"
    )
    result = run_python("-c", code, **env)
    assert result.returncode != 0
    (message,) = result.stderr.strip().splitlines()
    return message


def test_build_with_a_torch_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: no file')")
    message = run_setup(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert message == (
        "fastrnn compiles against torch, which does not import: libcudart.so.13: no file"
    )


def test_build_with_clang(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'Debian clang version 19.1.7'\n")
    compiler.chmod(0o755)
    message = run_setup(CXX=str(compiler))
    assert message.startswith("fastrnn needs g++") and "Debian clang version 19" in message


def test_build_without_compiler() -> None:
    message = run_setup(CXX="/nowhere/g++ -pipe")
    assert message.startswith("fastrnn needs g++ (set CXX): ") and "/nowhere/g++" in message
