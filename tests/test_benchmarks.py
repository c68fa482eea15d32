"""benchmarks/run.py measures what it says, writes it, and shows it; wrong options are refused."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from fastrnn.bench.shapes import Shape
from helpers import run_python

ROOT = Path(__file__).parents[1]
for extra in ("matplotlib", "tqdm"):  # which fastrnn[bench] brings
    pytest.importorskip(extra)

SHAPES = ["rnn-B2-T3-I4-H5", "lstm-B3-T7-I5-H9-f64"]


@pytest.mark.parametrize("peak", [None, 50.0])
def test_run(tmp_path: Path, peak: float | None) -> None:
    arguments = ["--threads", "1", "--seconds", "0.05", "--out", str(tmp_path)]
    for shape in SHAPES:
        arguments += ["--shape", shape]
    if peak is not None:
        arguments += ["--peak-gflops", str(peak)]
    process = run_python(str(ROOT / "benchmarks" / "run.py"), *arguments)
    assert process.returncode == 0, process.stdout + process.stderr
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [(r["shape"], r["mode"]) for r in records] == [
        (shape, mode) for mode in ("inference", "training") for shape in SHAPES
    ]
    for record in records:
        assert record["shape"] in process.stdout
        seconds = record["seconds"]["fastrnn"]["median"]
        gflops = Shape.parse(record["shape"]).flops(record["mode"]) / seconds / 1e9
        assert record["gflops"]["fastrnn"] == pytest.approx(gflops)
        assert record["share"] == pytest.approx(gflops / record["peak"])
        if peak is not None:
            assert record["peak"] == (peak / 2 if record["shape"].endswith("f64") else peak)
    for picture in ("ratio-torch.png", "overview-torch.png"):
        assert (tmp_path / picture).stat().st_size > 0


@pytest.mark.parametrize("script", ["derivatives", "transforms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_and_transforms(tmp_path: Path, script: str, shape: str) -> None:
    arguments = ["--shape", shape, "--seconds", "0.01", "--out", str(tmp_path)]
    process = run_python(str(ROOT / "benchmarks" / f"{script}.py"), *arguments)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads((tmp_path / f"{script}.json").read_text())["rows"]
    assert [row["shape"] for row in rows] == [shape] * 3


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        *((script, "--seconds=-1", "time") for script in ("run", "load", "latency", "scaling")),
        ("run", "--random=-1", "whole number"),
        ("run", "--peak-gflops=0", "above 0"),
        ("scaling", "--max-threads=0", "whole number"),
        ("load", "--shape=lstm", "not a shape id: 'lstm'"),
        ("run", "--shape=lstm", "not a shape id: 'lstm'"),
    ],
)
def test_wrong_arguments(
    script: str,
    wrong: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [script, wrong])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).parse_arguments()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
