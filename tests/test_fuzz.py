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

import fastrnn
from helpers import run_python
from test_bad_input import assert_same_outcome, outcome

CALLS = 6_000
SHAPES = 400


def run_worker(name: str, calls: int, folder: Path, **env: str) -> str:
    """Runs `name`_worker.py, which must end well; returns what it printed."""
    seed = os.environ.get("FASTRNN_FUZZ_SEED", "0")
    worker = Path(__file__).with_name(f"{name}_worker.py")
    options = ["-W", "ignore", "-X", "faulthandler"]
    result = run_python(*options, str(worker), seed, str(calls), cwd=str(folder), **env)
    last = (folder / f"{name}-{seed}").read_text(encoding="utf-8")
    assert result.returncode == 0, f"call {last}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_ops_raise_or_are_right_and_never_die(tmp_path: Path) -> None:
    accepted = int(run_worker("fuzz", CALLS, tmp_path).split()[0])
    assert CALLS // 5 < accepted < CALLS // 2, "calls are not the mixture that was meant"


@pytest.mark.parametrize("level", [{}, {"ATEN_CPU_CAPABILITY": "avx2"}], ids=["default", "avx2"])
def test_shapes_stay_within_their_working_memory(level: dict[str, str], tmp_path: Path) -> None:
    run_worker("shapes", SHAPES, tmp_path, **level)


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

    if name == "LSTM" and isinstance(x, PackedSequence) and hx is not None:
        # torch.nn checks no states of packed input, and reads past some, which ends the process.
        kind, message = outcome(action, fastrnn, name)
        if kind is RuntimeError and message.startswith("fastrnn:"):
            return
    assert_same_outcome(action, name)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell"])
@given(x=INPUTS, hx=STATES)
def test_cells(name: str, x: Any, hx: Any) -> None:
    def action(package: ModuleType, name: str) -> Tensor | tuple[Tensor, Tensor]:
        return getattr(package, name)(5, 8)(x, hx)

    assert_same_outcome(action, name)
