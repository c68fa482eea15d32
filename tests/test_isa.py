"""The kernels of each instruction set, forced by ATEN_CPU_CAPABILITY.

The matrix unit, where there is one, is left out (FASTRNN_AMX=0): all other tests run with it.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

import fastrnn
from helpers import assert_equal, run_python, run_tests

LEVELS = ["DEFAULT", "AVX2", "AVX512"]
WORKER = Path(__file__).with_name("isa_worker.py")


@cache
def best_level() -> str:
    """Returns the capability that torch finds when none is forced."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    return run_python("-c", code, ATEN_CPU_CAPABILITY="").stdout.strip()


def skip_unless_available(level: str) -> None:
    if best_level() not in LEVELS or LEVELS.index(level) > LEVELS.index(best_level()):
        pytest.skip(f"this CPU's best capability is {best_level()}")


def environment(level: str) -> dict[str, str]:
    """Returns the variables that force `level`."""
    return {"ATEN_CPU_CAPABILITY": level.lower(), "FASTRNN_AMX": "0"}


@cache
def results_under(level: str) -> dict[str, dict[str, Tensor]]:
    """Runs the worker, which checks its results, under `level`; returns them by case."""
    skip_unless_available(level)
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "results.pt")
        result = run_python(str(WORKER), level, path, **environment(level))
        assert result.returncode == 0, result.stderr
        return torch.load(path)


@pytest.mark.parametrize("level", LEVELS)
def test_matches_torch(level: str) -> None:
    assert results_under(level)


# What holds bit for bit or to the last place, and is computed by each set's own code.
STRICT_TESTS = [
    "test_activations.py",
    "test_rows.py",
    "test_threads.py",
    "test_samples.py",
    "test_packed.py::test_is_each_sequence_alone",
]
# Not in code of the instruction sets:
NOT_OF_KERNELS = "opcheck or vmap_over or cannot_be or another_size or python_threads or real_time"


@pytest.mark.parametrize("level", LEVELS)
def test_strict_tests(level: str) -> None:
    skip_unless_available(level)
    if level == torch.ops.fastrnn.cpu_capability() and not torch.ops.fastrnn.amx_dtypes():
        pytest.skip("the one in use, under which those tests run anyway")
    run_tests(*STRICT_TESTS, "-k", f"not ({NOT_OF_KERNELS})", **environment(level))


def test_avx2_and_avx512_give_the_same_bits() -> None:
    avx512, avx2 = results_under("AVX512"), results_under("AVX2")
    for case, expected in avx2.items():
        assert_equal(avx512[case], expected)


def test_lower_precision_without_the_matrix_unit() -> None:
    """On the bfloat16 dot product, where the processor has one: else all but two tests skip."""
    if not torch.ops.fastrnn.amx_dtypes():
        pytest.skip("there is none, and test_precision.py runs anyway")
    run_tests("test_precision.py", FASTRNN_AMX="0")


def test_matrix_unit_can_be_left_out() -> None:
    code = "import fastrnn; print(fastrnn.build_info()['amx'])"
    assert run_python("-c", code, FASTRNN_AMX="0").stdout.strip() == "()"
    assert run_python("-c", code).stdout.strip() == str(fastrnn.build_info()["amx"])
    assert fastrnn.build_info()["amx"] in ((), ("bfloat16", "float16"))


def test_default_is_the_best_level() -> None:
    code = "import fastrnn, torch; print(torch.ops.fastrnn.cpu_capability())"
    result = run_python("-c", code, ATEN_CPU_CAPABILITY="")
    assert result.stdout.strip() == (best_level() if best_level() in LEVELS else "DEFAULT")


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_beyond_the_processor_is_its_best(level: str) -> None:
    """torch takes ATEN_CPU_CAPABILITY's word, and then says that it uses AVX512 anywhere."""
    if best_level() not in LEVELS:
        pytest.skip(f"this CPU's capability is {best_level()}")
    code = """
import fastrnn, torch
print(torch.ops.fastrnn.cpu_capability())
fastrnn.LSTM(8, 8)(torch.zeros(3, 1, 8))
"""
    result = run_python("-c", code, **environment(level))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == min(level, best_level(), key=LEVELS.index)
