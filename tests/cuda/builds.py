"""Builds CUDA sources for the CPU, with the emulator, and runs what comes out.

Objects and programs lie in build/cuda-emulated, named by a hash of all that went into them, so that
only what changed is built again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATOR = HERE / "emulator"
CACHE = ROOT / "build" / "cuda-emulated"
JOBS = 2

KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

COMPILER = ["g++", "-std=c++17", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# A fused multiply-add is one instruction where the CPU has it, else a call; either way it is one
# only where the source says so.
COMPILER += ["-ffp-contract=off"]


@dataclass(frozen=True)
class Variant:
    """How to compile: the kernels with `flags`, the emulator without the sanitizer's checks."""

    optimize: str
    sanitizer: tuple[str, ...] = ()
    define: tuple[str, ...] = ()


VARIANTS = {
    "plain": Variant("-O2"),
    "asan": Variant(
        "-O1",
        (
            # Without the checks that double the compile time and find what AddressSanitizer does.
            *("-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr"),
            *("-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        ),
        ("-DFASTRNN_EMULATOR_ASAN",),
    ),
    "tsan": Variant("-O1", ("-fsanitize=thread",), ("-DFASTRNN_EMULATOR_TSAN",)),
}


def cpu_flags() -> list[str]:
    """Returns the flag for AVX2 and FMA if this CPU has them."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return ["-march=x86-64-v3"] if {"avx2", "fma", "bmi2", "movbe"} <= words else []


def compile_command(source: Path, variant: str, extra: Sequence[str] = ()) -> list[str]:
    """Returns the command that compiles `source`, but for what and where to write."""
    v = VARIANTS[variant]
    flags = [*cpu_flags(), *v.define, f"-I{EMULATOR}"]
    if source.parent == EMULATOR:
        flags += ["-O2"]
    else:
        flags += [v.optimize, *v.sanitizer, *extra]
    return [*COMPILER, *flags, "-x", "c++", str(source)]


def checked(command: Sequence[str]) -> bytes:
    """Runs `command` and returns its output."""
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        # The first error is what matters; templates make the rest endless.
        lines = done.stderr.decode().splitlines()[:40]
        raise RuntimeError("\n".join([" ".join(command), *lines]))
    return done.stdout


def make(command: Sequence[str], target: Path) -> None:
    """Runs `command -o target`, so that an interrupted run leaves no target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        checked([*command, "-o", str(partial)])
        partial.replace(target)


def build_object(source: Path, variant: str, extra: Sequence[str] = ()) -> Path:
    """Compiles `source` unless the same text was compiled by the same command before."""
    command = compile_command(source, variant, extra)
    text = checked([*command, "-E"])
    key = hashlib.sha256(b"\0".join([*(c.encode() for c in command), text])).hexdigest()[:24]
    target = CACHE / f"{source.stem}-{variant}-{key}.o"
    if not target.exists():
        make([*command, "-c"], target)
    return target


def build(
    sources: Sequence[Path],
    variant: str = "plain",
    *,
    shared: bool = False,
    extra: Sequence[str] = (),
    link: Sequence[str] = (),
) -> Path:
    """Builds a program, or a shared library, of `sources` and the emulator.

    Args:
        sources: .cu and .cpp files.
        variant: "plain", "asan" (AddressSanitizer and UBSan) or "tsan" (ThreadSanitizer).
        shared: A library instead of a program.
        extra: Flags for the sources, such as -Icsrc.
        link: Flags for the linker, such as -lc10.

    Returns:
        Its path, in build/cuda-emulated.
    """
    everything = [*sources, *sorted(EMULATOR.glob("*.cpp"))]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda s: build_object(Path(s), variant, extra), everything))
    command = ["g++", *VARIANTS[variant].sanitizer, *(["-shared"] * shared)]
    command += [*(str(o) for o in objects), *link]
    key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:24]
    suffix = ".so" if shared else ""
    target = CACHE / f"{Path(sources[0]).stem}-{variant}-{key}{suffix}"
    if not target.exists():
        make(command, target)
    return target


def run(program: Path, *arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    """Runs a program built here; settings are the emulator's, such as sms=4, schedule="random"."""
    environment = {
        **os.environ,
        # Fibers are never joined; short traces are faster.
        "TSAN_OPTIONS": "report_thread_leaks=0 history_size=0 exitcode=66 atexit_sleep_ms=0 "
        "halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    for name, value in settings.items():
        environment[f"FASTRNN_EMULATED_{name.upper()}"] = str(value)
    command = [str(program), *(str(a) for a in arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
