"""`python -m fastrnn.bench` times a shape, says what to expect, and refuses what makes no sense."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch

from fastrnn.bench.__main__ import caution, main
from fastrnn.bench.check import mismatches
from fastrnn.bench.measure import MODES, Measurement, build_steps, measure
from fastrnn.bench.report import sentence, table, verdict
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import Spread, cuda_timer
from fastrnn.bench.work import MODULES, Step, Workload, make_workload, time_limit
from helpers import run_python

TINY = ["--batch", "2", "--seq", "3", "--input", "4", "--hidden", "5", "--seconds", "0.05"]


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = [*TINY, "--threads", "1,2", "--compile-limit", "3600"]
    arguments += ["--json", "out.json", "--plot", "out.png"]
    process = run_python("-m", "fastrnn.bench", *arguments, cwd=str(tmp_path))
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["shape"] == {
        **{"kind": "lstm", "batch": 2, "seq": 3, "input": 4, "hidden": 5, "layers": 1},
        **{"bidirectional": False, "dtype": "f32"},
    }
    assert (found["mode"], found["device"]) == ("inference", "cpu")
    assert found["torch"] == torch.__version__ and found["machine"]["cores"]
    assert [result["threads"] for result in found["results"]] == [1, 2]
    for result in found["results"]:
        assert result["rounds"] >= 9
        assert result["seconds"].keys() == {"torch", "fastrnn", "torch.compile"}
        assert result["ratios"].keys() == {"torch", "torch.compile"} and not result["problems"]
        for name, ratio in result["ratios"].items():
            assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
            over = result["seconds"][name]["median"] / result["seconds"]["fastrnn"]["median"]
            assert ratio["q1"] / 2 < over < ratio["q3"] * 2
        assert result["sentence"] in process.stdout
    assert "torch.nn " in process.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize("kind", ["lstm", "rnn", "rnn-relu"])
def test_kinds(kind: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "out.json"
    arguments = [*TINY, "--kind", kind, "--dtype", dtype, "--mode", "training", "--no-compile"]
    arguments += ["--layers", "2", "--bidirectional"]
    assert main([*arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["shape"]["layers"] == 2 and found["shape"]["bidirectional"]
    (result,) = found["results"]
    assert result["seconds"].keys() == {"torch", "fastrnn"} and not result["problems"]
    assert f"{kind}, batch 2, 3 steps" in capsys.readouterr().out


def test_compile_that_fails_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "out.png"
    assert main([*TINY, "--compile-limit", "0.001", "--plot", str(plot)]) == 0 and plot.exists()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if " torch.compile " in line]
    assert "no figure: " in row and "not done after 0.001 s" in row


def test_without_extra(tmp_path: Path) -> None:
    def run(*more: str) -> CompletedProcess[str]:
        code = (
            "import runpy, sys; sys.modules |= {'tqdm': None, 'matplotlib': None};"
            f"sys.argv = {['bench', '--no-compile', *TINY, *more]};"
            "runpy.run_module('fastrnn.bench', run_name='__main__')"
        )
        return run_python("-c", code, cwd=str(tmp_path))

    process = run()
    assert process.returncode == 0, process.stderr
    assert "fastrnn is" in process.stdout and not process.stderr
    process = run("--plot", "out.png")
    assert process.returncode == 2
    assert "pip install matplotlib" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: '0' is not a whole number from 1 up"),
        (["--hidden", "1.5"], "argument --hidden: '1.5' is not a whole number from 1 up"),
        (["--threads", "1,two"], "argument --threads: 'two' is not a whole number from 1 up"),
        (["--seconds", "nan"], "argument --seconds: 'nan' is not a time in seconds"),
        (["--kind", "gru"], "argument --kind: invalid choice: 'gru'"),
        (["--json", "nowhere/out.json"], "argument --json: there is no folder nowhere"),
        (["--json", "."], "argument --json: . is a folder"),
        (["--plot", "a.foo"], "--plot a.foo: matplotlib writes "),
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device here"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_in_a_build_without_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("fastrnn.build_info", lambda: {"cuda": None})
    with pytest.raises(SystemExit) as stop:
        main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "fastrnn is built without CUDA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "found", "words"),
    [
        (Spread(2.31, 2.28, 2.35), "faster", "2.3 times as fast as torch.nn"),
        (Spread(1.256, 1.21, 1.3), "faster", "1.26 times as fast as torch.nn"),
        (Spread(12.4, 11.0, 13.0), "faster", "12 times as fast as torch.nn"),
        (Spread(0.8, 0.75, 0.82), "slower", "slower than torch.nn, taking 1.25 times as long"),
        (Spread(1.2, 0.9, 1.3), "level", "level with torch.nn"),  # 1 is between the quartiles
        (Spread(0.8, 0.75, 1.1), "level", "level with torch.nn"),
        (
            Spread(1.2, 0.9, 1.5),
            "level",
            "level with torch.nn (quartiles 0.90 to 1.50: not to be relied on)",
        ),
        (
            Spread(0.8, 0.7, 1.1),
            "level",
            "level with torch.nn (quartiles 0.70 to 1.10: not to be relied on)",
        ),
        (
            Spread(1981.0, 12.0, 4059.0),
            "faster",
            "1981 times as fast as torch.nn (quartiles 12 to 4059: not to be relied on)",
        ),
        (Spread(1.015, 1.01, 1.02), "level", "level with torch.nn"),  # too little to matter
    ],
)
def test_sentence(ratio: Spread, found: str, words: str) -> None:
    assert verdict(ratio) == found
    assert sentence({"torch": ratio}, "on 1 thread") == (
        f"For this shape, on 1 thread, fastrnn is {words}."
    )


@pytest.mark.parametrize(
    ("cores", "load", "threads", "words"),
    [
        (2, 0.4, 2, ""),
        (64, 20.0, 8, ""),
        (2, 0.0, 4, "4 threads share 2 cores here"),
        (2, 1.9, 2, "Load in the last minute was 1.9, on 2 cores"),
    ],
)
def test_caution(cores: int, load: float, threads: int, words: str) -> None:
    said = caution(cores, load, threads)
    assert said.startswith(words) and bool(said) == bool(words)


def test_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert main([*TINY, "--threads", "1", "--no-compile"]) == 0
    assert "Load in the last minute was 1000.0" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["--batch 1000000 --seq 1000000", "--hidden 10000000"])
def test_shape_that_does_not_fit(sizes: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*sizes.split(), "--no-compile"]) == 1
    assert "needs more memory than there is" in capsys.readouterr().err


def test_error_that_is_not_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("fastrnn.bench.__main__.measure", fail)
    with pytest.raises(RuntimeError, match="something else"):
        main(["--no-compile"])


def test_sentence_of_none_and_two() -> None:
    assert sentence({}, "here") == "For this shape, here, there is nothing to compare."
    ratios = {"torch": Spread(3.0, 2.9, 3.1), "torch.compile": Spread(0.5, 0.4, 0.6)}
    assert sentence(ratios, "on 2 threads") == (
        "For this shape, on 2 threads, fastrnn is 3.0 times as fast as torch.nn, and slower than "
        "torch.compile, taking 2.0 times as long."
    )


def test_table() -> None:
    seconds = {"torch": Spread(2e-3, 1e-3, 3e-3), "fastrnn": Spread(1e-5, 9e-6, 1.2e-5)}
    ratios, problems = {"torch": Spread(200, 150, 250)}, {"torch.compile": "it failed"}
    found = Measurement(2, 9, seconds, ratios, problems)
    lines = table([found], ["torch", "torch.compile", "other", "fastrnn"]).splitlines()[1:]
    assert [" ".join(line.split()) for line in lines] == [
        "2 torch.nn 2,000 1,000..3,000 200.00 150.00..250.00",
        "2 torch.compile no figure: it failed",
        "2 other not timed",
        "2 fastrnn 10.0 9.0..12.0",
    ]


def test_cuda_timer_takes_the_time_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            assert other is not self and log[-1] == "wait"
            return 12.0  # ms

    fake = SimpleNamespace(Event=Event, synchronize=lambda: log.append("drain"))
    monkeypatch.setattr(torch, "cuda", fake)
    assert cuda_timer(lambda: log.append("run"))(3) == pytest.approx(4e-3)
    assert log == ["run", "run", "drain", "record", "run", "run", "run", "record", "wait"]


def test_time_limit() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"after 0\.01 s"), time_limit(0.01):
        time.sleep(60)
    with time_limit(60):
        pass
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_time_limit_is_not_swallowed() -> None:
    caught = 0
    with pytest.raises(TimeoutError, match=r"after 0\.01 s"), time_limit(0.01):
        while caught < 2:
            try:
                time.sleep(60)
            except TimeoutError:
                caught += 1
    with pytest.raises(TimeoutError, match=r"after 0\.01 s"), time_limit(0.01):
        try:
            time.sleep(60)
        except TimeoutError as error:
            raise RuntimeError("compiling failed") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_wrong_results_are_seen(dtype: torch.dtype) -> None:
    right = {"output": torch.linspace(-0.01, 0.01, 100).to(dtype)}
    for same in (right, {"output": torch.zeros(3, dtype=dtype)}):
        assert mismatches(same, same) == []
    assert mismatches({}, right) == ["output is missing"]
    shorter = {"output": right["output"][1:]}
    assert mismatches(shorter, right) == ["output has shape (99,), not (100,)"]
    close = {"output": right["output"] * (1 + torch.finfo(dtype).eps)}
    assert mismatches(close, right) == []
    for wrong in (right["output"] * 1.1, torch.full_like(right["output"], torch.nan)):
        (line,) = mismatches({"output": wrong}, right)
        assert line.startswith("output differs by ")


@pytest.mark.parametrize(
    ("precision", "right", "wrong"),
    [("highest", 1e-5, 1e-4), ("high", 1e-3, 4e-3), ("medium", 0.03, 0.1)],
)
def test_lower_precision_is_allowed_what_it_costs(
    precision: str, right: float, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    expected = {"output": torch.linspace(-1, 1, 100)}
    for error, lines in ((right, 0), (wrong, 1)):
        found = mismatches({"output": expected["output"] * (1 + error)}, expected)
        assert len(found) == lines


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("rnn-B2-T9-I1-H1", [9, 9]),
        ("rnn-B4-T10-I1-H1-packed60", [2, 5, 7, 10]),
        ("rnn-B3-T9-I1-H1-packed10", [1, 5, 9]),
        ("rnn-B1-T9-I1-H1-packed60", [9]),
    ],
)
def test_lengths(text: str, lengths: list[int]) -> None:
    shape = Shape.parse(text)
    assert sorted(shape.lengths) == lengths and shape.steps == sum(lengths)
    assert len(lengths) < 3 or shape.lengths != lengths[::-1]  # nor sorted for packing


@pytest.mark.parametrize(
    "text", ["lstm-relu-B3-T7-I5-H9", "rnn-B3-T7-I5-H9-proj4", "lstm-B3-T7-I5-H9-proj9"]
)
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Shape.parse(text)


@pytest.mark.parametrize(
    ("text", "wrong_draws", "accepted"),
    [
        ("rnn-relu-B1-T2-I3-H4", 2, True),
        ("rnn-relu-B1-T2-I3-H4", 3, False),
        ("rnn-B1-T2-I3-H4", 1, False),
    ],
)
def test_a_sign_of_relu_that_a_rounding_turned(text: str, wrong_draws: int, accepted: bool) -> None:
    drawn: list[Workload] = []

    def build(work: Workload) -> Step | None:
        drawn.append(work)
        step = MODULES["fastrnn"](work)
        if step is None or len(drawn) > wrong_draws:
            return step
        return replace(step, results=lambda: step.results() | {"x.grad": torch.ones(2, 1, 3)})

    found = measure(Shape.parse(text), "training", 1, 0.01, MODULES | {"fastrnn": build})
    assert ("fastrnn" in found.seconds) == accepted == ("fastrnn" not in found.problems)
    inputs = {work.x.sum().item() for work in drawn}
    assert len(inputs) == len(drawn) == min(wrong_draws + accepted, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("rnn-B3-T7-I5-H9-hx", (7, 3, 9)),
        ("rnn-relu-B3-T7-I5-H9-packed60", (12, 9)),
        ("lstm-B3-T7-I5-H9-batchfirst", (3, 7, 9)),
        ("lstm-B3-T7-I5-H9-L2-bi-proj4-packed60-batchfirst-hx", (12, 8)),
    ],
)
def test_workload(text: str, size: tuple[int, ...], mode: str) -> None:
    shape = Shape.parse(text)
    work = make_workload(shape, mode)
    assert (work.hx is not None) == shape.hx
    steps, problems = build_steps(work, MODULES)
    assert steps.keys() == MODULES.keys() and not problems
    expected = MODULES["torch"](make_workload(shape, mode)).results()
    assert expected["output"].shape == size
    assert ("x.grad" in expected) == (mode == "training")
    for step in steps.values():  # once more
        assert mismatches(step.results(), expected) == []
