"""benchmarks/run.py measures what it says, writes it, and shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrnn.bench.shapes import Shape
from helpers import run_python

ROOT = Path(__file__).parents[1]
SHAPES = ["rnn-B2-T3-I4-H5", "lstm-B3-T7-I5-H9-f64"]


@pytest.mark.parametrize("peak", [None, 50.0])
def test_run(tmp_path: Path, peak: float | None) -> None:
    for module in ("matplotlib", "tqdm"):
        pytest.importorskip(module)
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
