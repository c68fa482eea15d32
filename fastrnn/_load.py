"""Loads the compiled ops, or says in a sentence why they cannot be."""

from __future__ import annotations

import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

# Without the cache: pip's wheel there may be for another torch.
REBUILD = (
    "rebuild it in its source tree with "
    "`pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .`"
)
LIBRARIES = ("_build_info", "_direct", "_ops")


def _release(version: str) -> tuple[str, ...]:
    """Major and minor version: what torch's C++ ABI is stable within."""
    return tuple(version.split("+")[0].split(".")[:2])


def load_ops() -> None:
    """Loads the library that registers `torch.ops.fastrnn`.

    Raises:
        ImportError: fastrnn is not built, or was built against a torch whose C++ ABI differs from
            the installed one's; or another copy of it is loaded.
    """
    folder = Path(__file__).parent
    missing = [name for name in LIBRARIES if not _find(folder, name)]
    if missing:
        raise ImportError(_missing(folder, missing))
    ops = os.path.realpath(str(_find(folder, "_ops")))  # as torch knows it
    from fastrnn import _build_info

    built, installed = _build_info.torch_version, str(torch.__version__)
    if _release(built) != _release(installed):
        raise ImportError(
            f"fastrnn was built against torch {built}, but torch {installed} is installed, and "
            f"their C++ ABIs differ: {REBUILD}"
        )
    loaded = [path for path in torch.ops.loaded_libraries if Path(path).name.startswith("_ops.")]
    if hasattr(torch.ops.fastrnn, "recurrent") and ops not in loaded:
        raise ImportError(
            f"another copy of fastrnn is loaded in this process, from {', '.join(loaded)}, and "
            f"{folder} is a second one: restart Python with one of them on its path"
        )
    try:
        torch.ops.load_library(ops)
    except OSError as error:  # torch's own; the cause has the linker's words
        raise ImportError(
            f"fastrnn, built against torch {built}, does not load with torch {installed} "
            f"({error.__cause__ or error}): {REBUILD}"
        ) from None


def _find(folder: Path, name: str) -> Path | None:
    """Returns the library of that name for this Python, or None."""
    paths = (folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _missing(folder: Path, names: list[str]) -> str:
    """Says which libraries are missing, and what to do."""
    what = f"fastrnn's compiled part is missing from {folder}"
    if len(names) < len(LIBRARIES):
        what += f" ({', '.join(names)})"
    others = sorted(path.name for name in names for path in folder.glob(f"{name}.*.so"))
    if others:
        what += (
            f" for this Python, which loads *{EXTENSION_SUFFIXES[0]} (there: {', '.join(others)})"
        )
    if (folder.parent / "setup.py").exists():
        return (
            f"{what}: this is the source tree. Build it in place with "
            "`pip install --no-build-isolation -e .`, or run Python from another folder to use "
            "the fastrnn that is installed"
        )
    return f"{what}: {REBUILD}"
