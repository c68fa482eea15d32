"""A pytest plugin: the modules run the CUDA path on CPU tensors, under the emulator.

pytest -p emulated tests/test_parity.py       with tests/cuda on PYTHONPATH
"""

from __future__ import annotations

from pathlib import Path

import torch
from builds import KERNELS, ROOT, build
from torch.utils.cpp_extension import include_paths, library_paths

import fastrnn  # noqa: F401  registers the ops whose kernels are replaced

GLUE = [
    Path(__file__).with_name("emulated_ops.cpp"),
    ROOT / "csrc" / "arguments.cpp",
    ROOT / "csrc" / "call_memory.cpp",
    ROOT / "csrc" / "contention.cpp",
    ROOT / "csrc" / "distance.cpp",
    *sorted((ROOT / "csrc").glob("gpu_*.cpp")),
]
COMPILE = ["-std=c++20", "-fvisibility=hidden", *(f"-isystem{path}" for path in include_paths())]
LINK = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]


def load() -> Path:
    """Replaces the CPU kernels of fastrnn's ops in this process; returns the library's path."""
    library = build([*GLUE, *KERNELS], shared=True, extra=COMPILE, link=LINK)
    torch.ops.load_library(str(library))
    return library


LIBRARY = load()
