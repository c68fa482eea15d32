"""The examples in the README and in docs/ run."""

import re
from pathlib import Path

import pytest

from helpers import run_python

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, tmp_path: Path) -> None:
    process = run_python("-c", code, cwd=str(tmp_path), OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr


def test_torchrun_example() -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = run_python(*arguments, str(ROOT / "examples" / "ddp.py"), OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert re.search(r"step 15: loss \d", process.stdout)
