"""Random arguments, mostly wrong ones, to the ops and to the modules, and random shapes.

The ops, and the shapes, are run in processes of their own, whose death would be the failure.
FASTRNN_FUZZ_SEED chooses other calls.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from helpers import run_python
from test_bad_input import assert_same_outcome

CALLS = 20_000
WORKER = Path(__file__).with_name("fuzz_worker.py")
SHAPES = 1_000
SHAPES_WORKER = Path(__file__).with_name("shapes_worker.py")


def test_ops_raise_or_are_right_and_never_die(tmp_path: Path) -> None:
    seed = os.environ.get("FASTRNN_FUZZ_SEED", "0")
    options = ["-W", "ignore", "-X", "faulthandler"]
    result = run_python(*options, str(WORKER), seed, str(CALLS), cwd=str(tmp_path))
    last = (tmp_path / f"fuzz-{seed}").read_text(encoding="utf-8")
    assert result.returncode == 0, f"call {last}\n{result.stdout}{result.stderr}"
    accepted = int(result.stdout.split()[0])
    assert CALLS // 5 < accepted < CALLS // 2, "calls are not the mixture that was meant"


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_shapes_stay_within_their_working_memory(capability: str, tmp_path: Path) -> None:
    seed = os.environ.get("FASTRNN_FUZZ_SEED", "0")
    level = {} if capability == "default" else {"ATEN_CPU_CAPABILITY": capability}
    options = ["-X", "faulthandler", str(SHAPES_WORKER), seed, str(SHAPES)]
    result = run_python(*options, cwd=str(tmp_path), **level)
    last = (tmp_path / f"shapes-{seed}").read_text(encoding="utf-8")
    assert result.returncode == 0, f"{last}\n{result.stdout}{result.stderr}"


SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 8])
DTYPES = st.sampled_from([torch.float32] * 6 + [torch.float64, torch.int64, torch.bool])
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    # What the module takes, or anything.
    st.sampled_from([(4, 3, 5), (4, 5), (1, 3, 8), (2, 3, 8), (1, 8), (1, 3, 4)])
    | st.lists(SIZES, max_size=4),
    DTYPES,
)
PACKED = st.builds(
    lambda rows, sizes: PackedSequence(torch.ones(rows, 5), torch.tensor(sizes, dtype=torch.int64)),
    st.integers(0, 8),
    st.lists(st.integers(-1, 4), max_size=4),
) | st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda sizes: PackedSequence(
        torch.ones(sum(sizes), 5), torch.tensor(sorted(sizes, reverse=True))
    )
)
ANYTHING = st.sampled_from([None, 1, "a", (), [], (None, None)])
INPUTS = st.one_of(TENSORS, TENSORS, PACKED, ANYTHING)
STATES = st.one_of(
    st.none(), TENSORS, st.tuples(TENSORS, TENSORS), st.lists(TENSORS, max_size=3), ANYTHING
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "num_layers": st.integers(1, 2),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
    },
)


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
@given(x=INPUTS, hx=STATES, options=OPTIONS)
def test_modules(name: str, x: Any, hx: Any, options: dict[str, Any]) -> None:
    def action(package: ModuleType, name: str) -> object:
        return getattr(package, name)(5, 8, **options)(x, hx)

    assert_same_outcome(action, name)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell"])
@given(x=INPUTS, hx=STATES)
def test_cells(name: str, x: Any, hx: Any) -> None:
    def action(package: ModuleType, name: str) -> Tensor | tuple[Tensor, Tensor]:
        return getattr(package, name)(5, 8)(x, hx)

    assert_same_outcome(action, name)
