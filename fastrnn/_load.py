"""Loads the compiled ops, or says in a sentence why they cannot be."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

REBUILD = (
    "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps fastrnn`, "
    "or `pip install --no-build-isolation --force-reinstall --no-deps .` in its source tree"
)


def _release(version: str) -> tuple[str, ...]:
    """Major and minor version: what torch's C++ ABI is stable within."""
    return tuple(version.split("+")[0].split(".")[:2])


def load_ops() -> None:
    """Loads the library that registers `torch.ops.fastrnn`.

    Raises:
        ImportError: fastrnn is not built, or was built against a torch whose C++ ABI differs from
            the installed one's.
    """
    try:
        from fastrnn import _build_info
    except ImportError as error:
        raise ImportError(
            f"fastrnn's compiled part is missing ({error}): build it with "
            "`pip install --no-build-isolation .`"
        ) from None
    built, installed = _build_info.torch_version, str(torch.__version__)
    if _release(built) != _release(installed):
        raise ImportError(
            f"fastrnn was built against torch {built}, but torch {installed} is installed, and "
            f"their C++ ABIs differ: {REBUILD}"
        )
    folder = Path(__file__).parent
    library = next(
        (path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_ops{suffix}").exists()), None
    )
    if library is None:
        raise ImportError(f"fastrnn's ops are missing from {folder}: {REBUILD}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"fastrnn, built against torch {built}, does not load with torch {installed} "
            f"({error}): {REBUILD}"
        ) from None
