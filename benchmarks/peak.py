"""One core's fused multiply-add peak, measured on the spot."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from fastrnn.bench.timing import SLICE_SECONDS

# The median of these counts, as of the calls that are held against it: what a core makes at the
# time. The best of many would be a clock that shared machines hardly ever have.
_SLICES = 9

# As wide as the vectors that torch, and so fastrnn, is held to.
_ISA_FLAGS = {"AVX2": ["-mno-avx512f"], "DEFAULT": ["-mno-avx"]}


@dataclass(frozen=True)
class Peak:
    """A core's multiply-adds, measured whenever they are asked for.

    Attributes:
        f32, f64: Functions that return GFLOP/s.
        source: Where the figures come from.
    """

    f32: Callable[[], float]
    f64: Callable[[], float]
    source: str

    @staticmethod
    def given(f32: float) -> Peak:
        """A known peak; float64's is half of it."""
        return Peak(lambda: f32, lambda: f32 / 2, source="given")

    def of(self, dtype: torch.dtype) -> float:
        """The peak a dtype is held against, now; bf16 and f16 against float32's."""
        return self.f64() if dtype == torch.float64 else self.f32()


def _rate(work: Callable[[int], object], flops: float) -> Callable[[], float]:
    """A function that returns the GFLOP/s of work(n), which does n * flops operations."""

    def seconds(n: int) -> float:
        start = time.perf_counter()
        work(n)
        return time.perf_counter() - start

    n = 1
    while seconds(n) < SLICE_SECONDS:
        n *= 2
    return lambda: n * flops / median(seconds(n) for _ in range(_SLICES)) / 1e9


def _from_registers(compiler: str) -> Peak:
    source = Path(__file__).with_name("peak.c")
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    if platform.machine() == "x86_64":
        flags += _ISA_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    with tempfile.TemporaryDirectory() as folder:
        library_path = Path(folder) / "peak.so"
        command = [compiler, *flags, str(source), "-o", str(library_path)]
        subprocess.run(command, check=True, capture_output=True)
        library = ctypes.CDLL(str(library_path))
    rates = []
    for name in ("peak_f32", "peak_f64"):
        work = getattr(library, name)
        work.argtypes, work.restype = [ctypes.c_long], ctypes.c_double
        flops = getattr(library, f"{name}_flops")
        flops.restype = ctypes.c_long
        rates.append(_rate(work, flops()))
    return Peak(rates[0], rates[1], source="multiply-adds in registers, measured")


def _from_matrix_product() -> Peak:
    size, rates = 512, []
    for dtype in (torch.float32, torch.float64):
        a = torch.rand(size, size, dtype=dtype)

        def work(n: int, a: torch.Tensor = a) -> None:
            torch.set_num_threads(1)  # a measurement sets its own after this
            for _ in range(n):
                torch.mm(a, a)

        rates.append(_rate(work, 2.0 * size**3))
    return Peak(
        rates[0], rates[1], source="torch.mm, measured: no C compiler, the true peak is higher"
    )


def measured_peak() -> Peak:
    """Compiles a small loop; without a C compiler, falls back to torch.mm, on one thread."""
    for compiler in filter(shutil.which, ("cc", "gcc", "clang")):
        try:
            return _from_registers(compiler)
        except (subprocess.CalledProcessError, OSError):
            continue
    return _from_matrix_product()
