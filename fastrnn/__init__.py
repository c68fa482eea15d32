"""Fused kernels for Elman RNN and LSTM, as drop-in PyTorch modules."""

from __future__ import annotations

from typing import Any

import torch

from fastrnn import _load

_load.load_ops()

from fastrnn import _build_info, _fakes, _flops  # noqa: E402, F401
from fastrnn._convert import convert, revert  # noqa: E402
from fastrnn.cells import LSTMCell, RNNCell  # noqa: E402
from fastrnn.modules import LSTM, RNN  # noqa: E402

__all__ = [
    "LSTM",
    "RNN",
    "LSTMCell",
    "RNNCell",
    "build_info",
    "convert",
    "release_memory",
    "revert",
]
__version__: str = _build_info.version


def build_info() -> dict[str, Any]:
    """What this installation was built from, and what it runs on.

    Returns:
        A dictionary:

        - version: of fastrnn.
        - torch: The release built against.
        - cuda: The CUDA release built against, or None.
        - compiler: Its name and version.
        - cpu_capability: The instruction set in use, AVX512, AVX2 or DEFAULT, as the environment
          variable ATEN_CPU_CAPABILITY names them.
        - amx: Names of the dtypes whose products run in the processor's matrix unit; none if
          FASTRNN_AMX was 0 when they first ran.
        - matmul_precisions: Those of "high" and "medium", the settings of
          torch.set_float32_matmul_precision, that make float32 faster here. The others change
          nothing.
    """
    return {
        "version": __version__,
        "torch": _build_info.torch_version,
        "cuda": _build_info.cuda,
        "compiler": _build_info.compiler,
        "cpu_capability": torch.ops.fastrnn.cpu_capability(),
        "amx": tuple(torch.ops.fastrnn.amx_dtypes()),
        "matmul_precisions": tuple(torch.ops.fastrnn.matmul_precisions()),
    }


def release_memory() -> None:
    """Frees the working memory that this thread keeps for its next call on a CPU.

    After inference a thread keeps what the call needed, if that was 64 MB or less: room for packed
    weights and the like, nothing of which another call reads. A training step frees it, and so
    does the end of the thread.
    """
    torch.ops.fastrnn.release_memory()
