"""The benchmarks' comparison with another commit: what counts as a loss, and that it runs."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastrnn.bench.timing import Spread
from helpers import run_python

ROOT = Path(__file__).parents[1]
SHAPE = "lstm-B8-T20-I64-H64"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for module in ("matplotlib", "tqdm"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("guard")


@pytest.mark.parametrize(
    ("base", "now", "verdict"),
    [
        (Spread(1.0, 0.9, 1.1), Spread(1.3, 1.2, 1.4), "loss"),
        (Spread(1.3, 1.2, 1.4), Spread(1.0, 0.9, 1.1), "gain"),
        (Spread(1.0, 0.9, 1.1), Spread(1.0, 0.9, 1.1), "level"),
        (Spread(1.0, 0.99, 1.01), Spread(1.09, 1.08, 1.1), "level"),  # clear, but under 10%
        (Spread(1.09, 1.08, 1.1), Spread(1.0, 0.99, 1.01), "level"),
        (Spread(1.0, 0.9, 1.3), Spread(1.5, 1.2, 1.6), "level"),  # more, but within the noise
        (Spread(1.5, 1.2, 1.6), Spread(1.0, 0.9, 1.3), "level"),
        (Spread(1.0, 0.9, 1.2), Spread(1.5, 1.2, 1.6), "level"),  # quartiles that touch
    ],
)
def test_verdict(guard: ModuleType, base: Spread, now: Spread, verdict: str) -> None:
    assert guard.judge(base, now) == verdict


class Processes:
    """Stands in for guard.Worker: answers with made-up times, an item of `now` each time started.

    An item is the time it takes, or what it raises; `base` is the same for the base, each time.
    """

    def __init__(self, guard: ModuleType, base: Any, now: list[Any]) -> None:
        self.guard, self.base, self.now = guard, base, iter(now)
        self.turns: list[str] = []

    def __call__(self, side: str, tree: Path) -> Processes:
        started = object.__new__(Processes)
        started.__dict__ |= self.__dict__
        started.side = side
        started.cost = next(self.now) if side == "now" else self.base
        return started

    def ask(self, **request: Any) -> dict[str, Any]:
        if isinstance(self.cost, str):
            raise self.guard.WorkerError(self.side, self.cost)
        return {}

    def seconds_a_call(self, calls: int) -> float:
        self.turns.append(self.side)
        return 1e-3 * self.cost

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("base", "now", "verdict", "passes"),
    [
        (1.0, [1.0], "level", True),
        (1.0, [1.3, 1.3], "loss", False),
        (1.0, [1.3, 1.0], "level", True),  # the loss went with the process
        (1.0, [0.7], "gain", True),
        (1.0, ["ArithmeticError: wrong"], "broken", False),
        ("ArithmeticError: wrong", ["ArithmeticError: wrong"], "broken", False),
        ("ArithmeticError: wrong", [1.0], "new", True),
    ],
)
def test_compare(
    guard: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    base: Any,
    now: list[Any],
    verdict: str,
    passes: bool,
    capsys: pytest.CaptureFixture,
) -> None:
    processes = Processes(guard, base, now)
    monkeypatch.setattr(guard, "Worker", processes)
    (found,) = guard.compare_all([(SHAPE, "inference", 1)], Path("base"), 0.2)
    assert (found.verdict, guard.passes([found])) == (verdict, passes)
    assert next(processes.now, None) is None  # timed as often as it had to be
    assert verdict in capsys.readouterr().out
    assert ("now: ArithmeticError" in guard.summary([found])) == (verdict == "broken")
    if verdict in ("level", "loss", "gain"):  # in turn, first one and then the other first
        assert processes.turns[2:10] == ["base", "now", "now", "base"] * 2


@pytest.fixture
def repository() -> Iterator[None]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs the git repository")
    kept = set((ROOT / "build" / "base").glob("*"))
    yield
    for tree in set((ROOT / "build" / "base").glob("*")) - kept:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


@pytest.mark.usefixtures("guard", "repository")
def test_head_against_itself(tmp_path: Path) -> None:
    arguments = ["--base", "HEAD", "--shape", SHAPE, "--mode", "inference", "--threads", "1"]
    arguments += ["--seconds", "0.2", "--out", str(tmp_path)]
    process = run_python(str(ROOT / "benchmarks" / "run.py"), *arguments)
    # 1 where other work, or an edit since HEAD, made it a loss.
    assert process.returncode in (0, 1), process.stdout + process.stderr
    (found,) = json.loads((tmp_path / "guard.json").read_text())["rows"]
    assert (found["shape"], found["verdict"] in ("level", "gain", "loss")) == (SHAPE, True)
    assert process.returncode == (found["verdict"] == "loss")
    assert all(found["seconds"][side]["median"] > 0 for side in ("base", "now"))


@pytest.mark.usefixtures("guard", "repository")
def test_unknown_commit() -> None:
    process = run_python(str(ROOT / "benchmarks" / "run.py"), "--base", "nowhere", "--shape", SHAPE)
    assert process.returncode == 2
    assert "nowhere" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.usefixtures("guard", "repository")
@pytest.mark.parametrize(("edited", "same"), [("csrc/notes.md", True), ("csrc/a.cpp", False)])
def test_build_is_shared_if_no_source_differs(
    edited: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = importlib.import_module("trees")
    monkeypatch.setattr(trees, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    for name in ("csrc/notes.md", "csrc/a.cpp", "setup.py"):
        (tmp_path / name).write_text("before")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "before"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / edited).write_text("after")
    assert trees._same_sources("HEAD") == same
