"""The compiled libraries: what they hold, and that they run on a processor without AVX-512."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from helpers import assert_equal, run_python

LIBRARIES = sorted(Path(fastrnn.__file__).parent.glob("*.so"))
OPS = next(path for path in LIBRARIES if path.name.startswith("_ops"))
EMULATOR = shutil.which("qemu-x86_64")

reads_machine_code = pytest.mark.skipif(
    not shutil.which("objdump") or os.uname().machine != "x86_64", reason="no objdump, or not x86"
)

# Prefixes that may stand before a VEX or EVEX one: segment overrides and the address size.
LEGACY_PREFIXES = {"26", "2e", "3e", "64", "65", "67"}
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")

RUN_CASES = """
import sys
import torch, fastrnn
from helpers import FUSED_DTYPES, build, cases, make_inputs, run

assert fastrnn.build_info()["cpu_capability"] == "AVX2"
torch.set_num_threads(1)
chosen = [
    *cases(N=[1, 13], H=[17, 64], hx=[True], dtype=FUSED_DTYPES),
    *cases(L=[2], D=[2], lengths=[(2, 7, 3)], dtype=FUSED_DTYPES),
]
results = {str(case): run(build(fastrnn, case), make_inputs(case)) for case in chosen}
torch.save(results, sys.argv[1])
"""


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_holds_no_path_of_the_build_machine(library: Path) -> None:
    sources = re.findall(rb"(?<![\w./+-])/[\w./+-]+\.(?:h|hpp|cpp)\b", library.read_bytes())
    assert not sources
    assert os.fsencode(sys.prefix) not in library.read_bytes()


def functions_with_vector_code(library: Path) -> dict[str, set[str]]:
    """Returns the names of functions that hold VEX- and EVEX-encoded instructions.

    In 64-bit code a first byte of c4 or c5 is always the one, 62 always the other.
    """
    command = ["objdump", "-d", "--insn-width=16", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, set[str]] = {"vex": set(), "evex": set()}
    function = ""
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            function = match[1]
            continue
        fields = line.split("\t")
        if len(fields) < 3:
            continue
        first = next((b for b in fields[1].split() if b not in LEGACY_PREFIXES), "")
        if first == "62":
            found["evex"].add(function)
        elif first in ("c4", "c5"):
            found["vex"].add(function)
    return found


@reads_machine_code
def test_vector_code_lies_in_its_namespace() -> None:
    """An inline function compiled for AVX-512 must never be the copy that everyone runs."""
    found = functions_with_vector_code(OPS)
    avx512 = "6avx512|11avx512_bf16|3amx|8amx_fp16"
    inside = {"vex": f"4avx2|{avx512}", "evex": avx512}
    for encoding, functions in found.items():
        assert len(functions) > 20  # the scan sees the kernels
        mangled = re.compile(rf"_Z[ZNKL]*7fastrnn({inside[encoding]})")  # _ZZ: a lambda
        strays = [name for name in functions if not mangled.match(name)]
        assert not strays, f"{encoding} instructions in {strays}"


def instructions(library: Path, function: re.Pattern[str]) -> dict[str, list[tuple[int, str]]]:
    """Returns the instructions of the functions with such names, each with its address."""
    command = ["objdump", "-dC", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    for block in listing.split("\n\n"):
        name = FUNCTION.match(block.splitlines()[0]) if block else None
        if name and (short := function.search(name[1])):
            lines = re.findall(r"^ +(\w+):\t(.+)$", block, re.M)
            found[short[0]] = [(int(at, 16), what) for at, what in lines]
    return found


def inner_loops(library: Path, function: re.Pattern[str]) -> dict[str, list[list[str]]]:
    """Returns the instructions of the innermost loops of the functions with such names."""
    found: dict[str, list[list[str]]] = {}
    for name, code in instructions(library, function).items():
        jumps = [(at, re.match(r"j\w+ +([0-9a-f]+) ", what)) for at, what in code]
        loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
        found[name] = [
            [what for at, what in code if begin <= at <= end]
            for begin, end in loops
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
        ]
    return found


@reads_machine_code
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_tiles_keep_their_sums_in_registers(isa: str) -> None:
    """A sum that goes through memory at every k once cost AVX2 half of its speed."""
    # Of whole panels, one or two: compilers differ in what they make of a part of one.
    tile = re.compile(rf"fastrnn::{isa}::\S* ?\S*::multiply<\S+, \d+, [48], (true|false)>")
    functions = inner_loops(OPS, tile)
    assert len(functions) >= 12  # rows, panels, element types, fetching or not
    for name, loops in functions.items():
        products = [loop for loop in loops if any("vfmadd" in i or "vdpbf16" in i for i in loop)]
        assert products, name
        stores = [i for loop in products for i in loop if re.search(r"mm\d+,\S*\(%r[sb]p", i)]
        assert not stores, (name, stores)


@reads_machine_code
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_packing_calls_nothing(isa: str) -> None:
    """A call for each square, which then lay in memory, once cost packing half of its speed."""
    packing = re.compile(rf"fastrnn::{isa}::\S* ?\S*::pack_panel<\S+>\(")
    functions = instructions(OPS, packing)
    assert len(functions) >= 2
    for name, code in functions.items():
        calls = [what for _, what in code if re.match(r"call.*fastrnn", what)]
        assert not calls, (name, calls)


@pytest.mark.skipif(EMULATOR is None, reason="no qemu-x86_64 (Debian: qemu-user)")
def test_runs_on_haswell(tmp_path: Path) -> None:
    """Whole, on an emulated AVX2 processor: results have the bits of the AVX2 kernels here.

    Not held against torch.nn, whose float32 LSTM is wrong under qemu 7.2.
    """
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here to compare with")
    tests = str(Path(__file__).parent)
    here, there = tmp_path / "here.pt", tmp_path / "there.pt"
    native = run_python("-c", RUN_CASES, str(here), cwd=tests, ATEN_CPU_CAPABILITY="avx2")
    assert native.returncode == 0, native.stderr
    environment = {name: v for name, v in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    emulated = subprocess.run(
        [str(EMULATOR), "-cpu", "Haswell", sys.executable, "-c", RUN_CASES, str(there)],
        cwd=tests,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert emulated.returncode == 0, emulated.stderr
    expected, results = torch.load(here), torch.load(there)
    assert expected.keys() == results.keys()
    for case, want in expected.items():
        assert_equal(results[case], want)
