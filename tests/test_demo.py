"""The demo runs from start to end, learns the digits, and says what it lacks."""

import re
from pathlib import Path

import pytest

from helpers import run_python

EXTRA = ["sklearn", "matplotlib", "tqdm"]


def test_demo(tmp_path: Path) -> None:
    for module in EXTRA:
        pytest.importorskip(module)
    result = run_python("-m", "fastrnn", "--epochs", "25", "--out", "digits.png", cwd=str(tmp_path))
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert (
        len(re.findall(r"^(?:RNN|LSTM)\(5, 8.*\(1, 10, (?:8|16)\).*x +\d+\.\dx$", text, re.M)) == 4
    )
    accuracies = re.findall(r"^(\S+LSTM) +(\d+\.\d)% +\d+\.\d s$", text, re.M)
    assert [name for name, _ in accuracies] == ["nn.LSTM", "fastrnn.LSTM"]
    assert all(float(accuracy) >= 95 for _, accuracy in accuracies)
    assert "fastrnn.LSTM" in result.stderr and "100%" in result.stderr  # the progress bar
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", EXTRA)
def test_missing_extra(missing: str) -> None:
    code = (
        f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['fastrnn'];"
        "runpy.run_module('fastrnn', run_name='__main__')"
    )
    result = run_python("-c", code)
    assert result.returncode == 1
    (message,) = result.stderr.strip().splitlines()
    assert f"pip install {missing.replace('sklearn', 'scikit-learn')}" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--threads", "0"],
        ["--epochs", "many"],
        ["--out", "no/such/folder.png"],
        ["--out", "."],
        ["--out", "digits.foo"],
        ["--colour"],
    ],
)
def test_bad_arguments(arguments: list[str]) -> None:
    result = run_python("-m", "fastrnn", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: python -m fastrnn")
