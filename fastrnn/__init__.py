"""Fused kernels for Elman RNN and LSTM, as drop-in PyTorch modules.

- `RNN`, `LSTM`, `RNNCell` and `LSTMCell` are used as those of torch.nn.
- `convert` puts them in the place of torch.nn's in a model, and `revert` undoes that.
- `build_info` says what this installation was built from, `release_memory` frees working memory.

`python -m fastrnn` is a demo; `python -m fastrnn.bench` times a shape of your own.

In shapes T is time steps, N the batch, I input features, H hidden units, L layers, D directions
(1 or 2), P the width of h (H, or proj_size).
"""

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

        - version: The release of fastrnn.
        - commit: The commit that was built, with "-dirty" after it if files were changed; None if
          the sources were no git checkout, as for a wheel made of a source distribution.
        - torch: The release of torch built against.
        - cuda: The CUDA release built against, or None.
        - compiler: Its name and version.
        - cpu_capability: The instruction set in use, AVX512, AVX2 or DEFAULT, as the environment
          variable ATEN_CPU_CAPABILITY names them.
        - amx: Names of the dtypes whose products run in the processor's matrix unit; none if
          FASTRNN_AMX was 0 when they first ran.
        - matmul_precisions: Which of "high" and "medium", settings of
          torch.set_float32_matmul_precision, make float32 faster on this processor. A setting that
          is not named changes nothing here.
    """
    return {
        "version": __version__,
        "commit": _build_info.commit,
        "torch": _build_info.torch_version,
        "cuda": _build_info.cuda,
        "compiler": _build_info.compiler,
        "cpu_capability": torch.ops.fastrnn.cpu_capability(),
        "amx": tuple(torch.ops.fastrnn.amx_dtypes()),
        "matmul_precisions": tuple(torch.ops.fastrnn.matmul_precisions()),
    }


def release_memory() -> None:
    """Frees the working memory that this thread keeps for its next call on a CPU.

    After inference a thread keeps the memory that the call needed, if that was 64 MB or less: room
    for packed weights and the like. No later call reads what an earlier one left there. A training
    step frees it, and so does the end of the thread.
    """
    torch.ops.fastrnn.release_memory()
