"""Another commit of this repository, checked out and built beside the working tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_COMPILED = ("csrc", ":!*.md", "setup.py")  # what the extension modules are made from


class TreeError(Exception):
    """The commit cannot be found, checked out or built; the message says why."""


def _run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise TreeError(f"{' '.join(command)}:\n{(result.stderr or result.stdout)[-3000:].strip()}")
    return result.stdout.strip()


def _same_sources(commit: str) -> bool:
    """Whether the working tree's compiled sources are the commit's."""
    command = ["git", "diff", "--quiet", commit, "--", *_COMPILED]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def prepare(revision: str) -> Path:
    """Checks a commit out in a git worktree under build/base and builds it there in place.

    What was built once is kept; `make clean` removes it. Where the commit's compiled sources are
    the working tree's, the working tree's build is copied.

    Args:
        revision: Anything that git knows as a commit.

    Returns:
        The folder to put first in PYTHONPATH.

    Raises:
        TreeError: git or the compiler refused.
    """
    commit = _run(["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], ROOT)
    tree = ROOT / "build" / "base" / f"{commit[:12]}-torch-{torch.__version__}"
    built = tree / "build" / "complete"
    if built.exists():
        return tree
    _run(["git", "worktree", "prune"], ROOT)
    if not tree.exists():
        _run(["git", "worktree", "add", "--detach", str(tree), commit], ROOT)
    libraries = list((ROOT / "fastrnn").glob("*.so"))
    if libraries and _same_sources(commit):
        for library in libraries:
            shutil.copy2(library, tree / "fastrnn")
    else:
        print(f"building {revision} ({commit[:12]}), some minutes", flush=True)
        _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
    built.parent.mkdir(exist_ok=True)
    built.touch()
    return tree
