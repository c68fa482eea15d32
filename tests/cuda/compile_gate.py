"""Compiles the CUDA kernels with nvcc: a warning or a spilled register fails.

So does a kernel that reads what other blocks write by way of a cache that they do not reach, which
no emulation shows.

What ptxas reports of each kernel is held against the committed table csrc/cuda/registers.txt;
`--write` renews it. Needs nvcc (of CUDA_HOME, or on PATH), no GPU.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = ROOT / "csrc" / "cuda" / "registers.txt"
ARCHS = ["sm_80", "sm_90"]
FLAGS = [
    *("-O3", "-std=c++17", "-lineinfo", "-Werror", "all-warnings"),
    *("-Xptxas", "-v,--warn-on-spills,--warning-as-error"),
]
CELLS = ["lstm", "rnn_tanh", "rnn_relu"]


def find_nvcc() -> str | None:
    """Returns the path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")


def compile_kernels(nvcc: str, source: Path, arch: str) -> str:
    """Compiles one source for one architecture, and returns what ptxas says."""
    number = arch.removeprefix("sm_")
    target = [f"-gencode=arch=compute_{number},code={arch}"]
    if arch == ARCHS[-1]:  # for what comes later, its driver compiles this
        target.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "kernels.o")
        keep = ["--keep", "--keep-dir", folder]
        command = [nvcc, *FLAGS, *target, *keep, "-c", str(source), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        check_reads(ptx.read_text(encoding="utf-8"), arch)
    return done.stderr


def check_reads(ptx: str, arch: str) -> None:
    """Stops unless reads of what other blocks write go to L2 (cg), none to read-only caches."""
    for kernel in re.split(r"\.entry ", ptx)[1:]:
        name = short_name(re.match(r"\w+", kernel)[0])
        if "ld.global.nc" in kernel:
            raise SystemExit(f"{arch}: {name} reads global memory by the read-only cache")
        if name.startswith("persistent") and "ld.global.cg" not in kernel:
            raise SystemExit(
                f"{arch}: {name} reads nothing past L1, where h of others may be stale"
            )


def short_name(mangled: str) -> str:
    """Returns a kernel's name and template arguments: pointwise_forward_kernel<float, lstm>."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(fastrnn::Cell\)(\d)", lambda cell: CELLS[int(cell[1])], name)
    return re.search(r"\w+_kernel(<.*>)?", name)[0]


def table_rows(report: str) -> list[str]:
    """Returns a line for each kernel in ptxas's report."""
    pattern = r"entry function '(\w+)' for '(sm_\d+)'.*?Used (\d+) registers"
    return [
        f"{arch}  {short_name(mangled)}  {registers}"
        for mangled, arch, registers in re.findall(pattern, report, re.S)
    ]


def main() -> int:
    """Runs the gate; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the table")
    write = parser.parse_args().write
    nvcc = find_nvcc()
    if nvcc is None:
        print("skipped: no nvcc (set CUDA_HOME)")
        return 0
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release [\d.]+, (V[\d.]+)", release)[1]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [(source, arch) for arch in ARCHS for source in KERNELS]
        reports = pool.map(lambda job: compile_kernels(nvcc, *job), jobs)
        rows = sorted(row for report in reports for row in table_rows(report))
    table = [
        f"# Registers of a thread, by ptxas of CUDA {release}; nothing spills.",
        "# Written by `python tests/cuda/compile_gate.py --write`.",
        *rows,
    ]
    print(f"compiled {len(rows)} kernels for {' and '.join(ARCHS)}: no warning, spill, stale read")
    if write:
        TABLE.write_text("\n".join(table) + "\n", encoding="utf-8")
        return 0
    committed = TABLE.read_text(encoding="utf-8").splitlines()
    if release not in committed[0]:
        print(f"not compared: {TABLE.name} is of another release of CUDA than {release}")
        return 0
    difference = list(difflib.unified_diff(committed, table, TABLE.name, "now", lineterm="", n=0))
    if difference:
        print("\n".join([*difference, "registers changed: look why, then renew with --write"]))
    return bool(difference)


if __name__ == "__main__":
    sys.exit(main())
