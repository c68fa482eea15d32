"""One core's fused multiply-add peak, measured on the spot."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_SLICES = 60  # the best of these counts: noise only ever slows
_SLICE_SECONDS = 0.005


@dataclass(frozen=True)
class Peak:
    """GFLOP/s of one core, and where the figures come from."""

    f32: float
    f64: float
    source: str

    def of(self, dtype: torch.dtype) -> float:
        """The peak a dtype is held against; bf16 and f16 against float32's."""
        return self.f64 if dtype == torch.float64 else self.f32


def _best_rate(work: Callable[[int], object], flops: float) -> float:
    """GFLOP/s of work(n), which does n * flops operations, in its best slice."""
    n, best = 1, 0.0
    while True:
        start = time.perf_counter()
        work(n)
        elapsed = time.perf_counter() - start
        if elapsed >= _SLICE_SECONDS:
            break
        n *= 2
    for _ in range(_SLICES):
        start = time.perf_counter()
        work(n)
        best = max(best, n * flops / (time.perf_counter() - start) / 1e9)
    return best


def _from_registers(compiler: str) -> Peak:
    source = Path(__file__).with_name("peak.c")
    with tempfile.TemporaryDirectory() as folder:
        library_path = Path(folder) / "peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        command = [compiler, *flags, str(source), "-o", str(library_path)]
        subprocess.run(command, check=True, capture_output=True)
        library = ctypes.CDLL(str(library_path))
    rates = []
    for name in ("peak_f32", "peak_f64"):
        work = getattr(library, name)
        work.argtypes, work.restype = [ctypes.c_long], ctypes.c_double
        flops = getattr(library, f"{name}_flops")
        flops.restype = ctypes.c_long
        rates.append(_best_rate(work, flops()))
    return Peak(rates[0], rates[1], source="multiply-adds in registers, measured")


def _from_matrix_product() -> Peak:
    size, rates = 512, []
    for dtype in (torch.float32, torch.float64):
        a = torch.rand(size, size, dtype=dtype)

        def work(n: int, a: torch.Tensor = a) -> None:
            for _ in range(n):
                torch.mm(a, a)

        rates.append(_best_rate(work, 2.0 * size**3))
    return Peak(
        rates[0], rates[1], source="torch.mm, measured: no C compiler, the true peak is higher"
    )


def measure_peak() -> Peak:
    """Compiles and runs a small loop; without a C compiler, falls back to torch.mm's rate.

    Sets the number of torch threads to 1.
    """
    torch.set_num_threads(1)
    for compiler in filter(shutil.which, ("cc", "gcc", "clang")):
        try:
            return _from_registers(compiler)
        except (subprocess.CalledProcessError, OSError):
            continue
    return _from_matrix_product()
