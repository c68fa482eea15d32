"""The emulator runs right kernels right, and reports wrong ones."""

import ctypes
import platform
import shutil
from pathlib import Path

import pytest
from builds import build, run

SELFTEST = Path(__file__).with_name("emulator_selftest.cpp")
SCHEDULES = ["round_robin", "block_first", "warp_first", "random"]

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the emulator's fibers need x86-64 and g++",
)


@pytest.fixture(scope="session", params=["plain", "asan", "tsan"])
def program(request: pytest.FixtureRequest) -> Path:
    return build([SELFTEST], request.param)


@pytest.fixture(scope="session")
def plain() -> Path:
    return build([SELFTEST], "plain")


@pytest.fixture(scope="session")
def asan() -> Path:
    return build([SELFTEST], "asan")


@pytest.fixture(scope="session")
def tsan() -> Path:
    return build([SELFTEST], "tsan")


RIGHT = [
    "reverse",
    "warp-reverse",
    "rotate",
    "rotate-in-cluster",
    "same-place",
    "shuffle",
    "no-fault",
    "multiply",
    "enough-order",
    "stacks",
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", [*RIGHT, "touch"])
def test_right_kernel(program: Path, case: str, schedule: str) -> None:
    done = run(program, case, schedule=schedule, seed=3)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("seed", range(5))
def test_right_kernel_under_other_seeds(program: Path, seed: int) -> None:
    for case in RIGHT:
        done = run(program, case, schedule="random", seed=seed)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("case", ["conversions", "limits", "largest"])
def test_plain(plain: Path, case: str) -> None:
    done = run(plain, case)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_many_fibers_of_threadsanitizers(tsan: Path) -> None:
    done = run(tsan, "rotate-most-fibers")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# Phase, block and warp of what runs, around a barrier of the warp and one of the block.
ORDERS = {
    "round_robin": "a00 a01 a10 a11 b00 b01 b10 b11 c00 c01 c10 c11",
    "block_first": "a00 a01 b00 b01 c00 c01 a10 a11 b10 b11 c10 c11",
    "warp_first": "a00 b00 a01 b01 c01 a10 b10 a11 b11 c11 c00 c10",
}


@pytest.mark.parametrize("schedule", ORDERS)
def test_order(plain: Path, schedule: str) -> None:
    assert run(plain, "order", schedule=schedule).stdout == ORDERS[schedule] + " ok\n"


def test_random_order_depends_on_the_seed_alone(plain: Path) -> None:
    orders = [run(plain, "order", schedule="random", seed=seed).stdout for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


RACES = [
    "load-own-part-without-barrier",
    *("reverse-no-barrier", "warp-reverse-no-barrier", "rotate-no-barrier", "same-place-race"),
    "rotate-in-cluster-no-barrier",
    *("multiply-no-barrier-before", "multiply-no-barrier-after", "shuffle-orders-nothing"),
    *("warp-orders-no-other-warp", "half-warp-orders-no-other-half", "block-orders-no-other-block"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", RACES)
def test_race(tsan: Path, case: str, schedule: str) -> None:
    done = run(tsan, case, schedule=schedule)
    assert done.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "_kernel" in done.stderr
    assert "emulator_selftest.cpp" in done.stderr


BOUNDS = {
    "touch-global": "heap-buffer-overflow",
    "touch-shared": "heap-buffer-overflow",
    "touch-before-shared": "heap-buffer-overflow",
    "touch-no-shared": "use-after-poison",
    "recurse": "stack-overflow",
}


@pytest.mark.parametrize("case", BOUNDS)
def test_out_of_bounds(asan: Path, case: str) -> None:
    done = run(asan, case)
    assert done.returncode == 1
    assert f"AddressSanitizer: {BOUNDS[case]}" in done.stderr
    assert "_kernel" in done.stderr
    assert "emulator_selftest.cpp" in done.stderr


def test_misaligned_vector(asan: Path) -> None:
    done = run(asan, "misaligned")
    assert done.returncode == 1
    assert "emulator_selftest.cpp" in done.stderr
    assert "misaligned address" in done.stderr


def test_stack_is_guarded(plain: Path) -> None:
    assert run(plain, "recurse").returncode == -11


# What each says, but for the place in the source.
FAULTS = {
    "lane-not-named": "__shfl_xor_sync: lane 31 calls it with mask 0x7fffffff, which does not name",
    "named-lane-leaves": "__shfl_xor_sync: lane 5, which mask 0xffffffff names, has left",
    "named-lane-elsewhere": "deadlock: all threads wait",
    "unnamed-source": "__shfl_sync: lane 0 reads lane 8, which mask 0x000000ff does not name",
    "other-operation": "lane 8 is at __shfl_xor_sync, lane 0 at __syncwarp",
    "thread-leaves": "__syncthreads: a thread has left the kernel",
    "other-barrier": "__syncthreads: other threads of the block are at that of",
    "half-waits-for-grid": "deadlock: all threads wait",
    "grid-without-cooperation": "grid.sync: the launch was not cooperative",
    "block-leaves-cluster": "cluster.sync: a thread has left the kernel",
    "multiply-misaligned": "is not aligned to 32 bytes",
    "multiply-leading-dimension": "leading dimension 20 is no multiple of 8",
    "multiply-half-a-warp": "load_matrix_sync: lane 16, which mask 0xffffffff names, has left",
}


@pytest.mark.parametrize("case", FAULTS)
def test_fault(program: Path, case: str) -> None:
    done = run(program, case)
    assert done.returncode == -6
    assert "fastrnn emulator: error: " in done.stderr
    assert FAULTS[case] in done.stderr
    assert f"{SELFTEST}:" in done.stderr


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", FAULTS)
def test_fault_under_schedule(plain: Path, case: str, schedule: str) -> None:
    assert run(plain, case, schedule=schedule).returncode == -6


def test_deadlock_says_who_waits_for_whom(plain: Path) -> None:
    error = run(plain, "named-lane-elsewhere").stderr
    assert "62 wait at __shfl_xor_sync with mask 0xffffffff, for lanes 0x00000020" in error
    assert "2 wait at __syncthreads, such as block (0,0,0) thread (5,0,0)" in error


def test_setting_that_is_none(plain: Path) -> None:
    assert run(plain, "reverse", schedule="sideways").returncode == -6


def test_shared_library() -> None:
    library = ctypes.CDLL(str(build([SELFTEST], "plain", shared=True)))
    assert library.fastrnn_emulator_set(b"sms", b"4") == 0
    assert library.fastrnn_emulator_set(b"smiles", b"4") == -1


def test_only_what_changed_is_built(tmp_path: Path) -> None:
    source = tmp_path / "program.cu"
    source.write_text("int main() { return 3; }\n")
    first = build([source])
    built = first.stat().st_mtime_ns
    assert build([source]) == first
    assert first.stat().st_mtime_ns == built
    assert run(first).returncode == 3
    source.write_text("int main() { return 4; }\n")
    assert run(build([source])).returncode == 4
    with pytest.raises(RuntimeError, match="SYNTAX"):
        build([source], extra=["-Dmain=SYNTAX("])
