"""The pages are true: examples run, and the files, headings, targets and options named exist."""

import doctest
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastrnn
from fastrnn import _convert, cells, modules
from helpers import run_python

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "benchmarks", "csrc/cpu", "csrc/cuda")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_is_markdown(page: Path) -> None:
    """clang-format, for one, takes a page for C++ without a word."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    assert text.startswith("# ")
    assert not re.findall(r"^[ \t]*#+\w.*", text, re.M)
    table_rows = re.findall(r"^ *\|.*", text, re.M)
    assert [row for row in table_rows if not row.rstrip().endswith("|")] == []


def test_the_headline_is_the_tables() -> None:
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (?:RNN|LSTM) \| (\d\.\d, worst .*) \|$", text, re.M)
    means = [float(mean) for row in rows for mean in re.findall(r"([\d.]+), worst", row)]
    assert len(means) == 8
    assert f"{min(means)} to {max(means)} times as fast as torch.nn on average" in text


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, tmp_path: Path) -> None:
    process = run_python("-c", code, cwd=str(tmp_path), OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("module", [modules, cells, _convert], ids=lambda module: module.__name__)
def test_docstring_examples(module: ModuleType) -> None:
    names = {"fastrnn": fastrnn, "torch": torch}
    failed, attempted = doctest.testmod(module, extraglobs=names)
    assert attempted and not failed


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    names = re.findall(r"`((?:csrc|fastrnn|tests|benchmarks|docs|examples)/[\w./]+\.\w+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_headings_that_pages_link_to_exist(page: Path) -> None:
    for file, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        assert heading in headings(page.parent / file if file else page)


def test_targets_that_pages_make_exist() -> None:
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.M)
    command = re.compile(r"(?:^    |`)(?:\S+='[^']*' )?make ((?:[a-z-]+ ?)+)", re.M)
    made = " ".join(names for page in PAGES for names in command.findall(page.read_text())).split()
    assert len(made) > 10 and set(made) <= set(" ".join(rules).split())


def programs() -> dict[str, set[str]]:
    """Returns the options with which pages run each program of the repository."""
    found: dict[str, set[str]] = defaultdict(set)
    command = r"python (-m fastrnn(?:\.bench)?|\w+/\w+\.py)\b([^#`\n]*)"
    for page in PAGES:
        for program, rest in re.findall(command, page.read_text().replace("\\\n", "")):
            found[program].update(re.findall(r"--[\w-]+", rest))
    return {program: options for program, options in found.items() if options}


PROGRAMS = programs()


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_options_that_pages_give_exist(program: str) -> None:
    process = run_python(*program.split(), "--help", cwd=str(ROOT))
    assert process.returncode == 0, process.stderr
    assert set(re.findall(r"--[\w-]+", process.stdout)) >= PROGRAMS[program]
