"""The examples in the README and in docs/ run."""

import re
from pathlib import Path

import pytest

from helpers import run_python

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, *sorted((ROOT / "benchmarks").glob("*.md")), *sorted(ROOT.glob("csrc/*/*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_is_markdown(page: Path) -> None:
    """clang-format, for one, takes a page for C++ without a word."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    assert text.startswith("# ")
    assert not re.findall(r"^[ \t]*#+\w.*", text, re.M)
    table_rows = re.findall(r"^ *\|.*", text, re.M)
    assert [row for row in table_rows if not row.rstrip().endswith("|")] == []


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, tmp_path: Path) -> None:
    process = run_python("-c", code, cwd=str(tmp_path), OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr


def test_torchrun_example() -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = run_python(*arguments, str(ROOT / "examples" / "ddp.py"), OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert re.search(r"step 15: loss \d", process.stdout)


def test_streaming_example() -> None:
    process = run_python(str(ROOT / "examples" / "streaming.py"), "--frames", "20")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert sum(line.startswith(("RNN", "LSTM")) for line in lines) == 8


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    names = re.findall(r"`((?:csrc|fastrnn|tests|benchmarks|docs|examples)/[\w./]+\.\w+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing
