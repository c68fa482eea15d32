"""Which path a layer takes, seen in a profile; test_modules.py runs it on emulated kernels."""

from __future__ import annotations

import ctypes
import os

import emulated
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastrnn

HALF = [torch.float16, torch.bfloat16]


def paths(module: torch.nn.RNNBase, batch: int, steps: int = 3) -> set[str]:
    """Returns the paths of a training step, such as {"persistent_forward", "stepwise_backward"}."""
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(steps, batch, module.input_size, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        module(x)[0].sum().backward()
    names = {event.name.removeprefix("fastrnn::") for event in seen.events()}
    return {name for name in names if name.startswith(("persistent_", "stepwise_"))}


PERSISTENT = {"persistent_forward", "persistent_backward"}
STEPWISE = {"stepwise_forward", "stepwise_backward"}


@pytest.fixture(autouse=True)
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRNN_CUDA_PATH", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.RNN])
def test_small_layers_persist(kind: type, dtype: torch.dtype) -> None:
    assert paths(kind(5, 20, dtype=dtype), batch=3) == PERSISTENT


def test_float64_and_projections_go_step_by_step() -> None:
    assert paths(fastrnn.LSTM(5, 20, dtype=torch.float64), batch=3) == STEPWISE
    assert paths(fastrnn.LSTM(5, 20, proj_size=7), batch=3) == STEPWISE


# 100 blocks of 8 units, or 50 of 16: whether they run at once is a matter of the device.
def test_as_many_blocks_as_fit() -> None:
    few = os.environ.get("FASTRNN_EMULATED_SMS") == "4"
    assert paths(fastrnn.LSTM(5, 800), batch=1, steps=10) == (STEPWISE if few else PERSISTENT)


# A persistent kernel first copies its weights, which one step does not make up for.
def test_one_step_of_many_units_is_a_step() -> None:
    assert paths(fastrnn.LSTM(5, 800), batch=1, steps=1) == STEPWISE


# As where other work, or a partition, has taken multiprocessors since the first call.
def test_what_the_device_no_longer_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_PATH", "persistent")
    emulator = ctypes.CDLL(str(emulated.LIBRARY))
    ours, x = fastrnn.LSTM(5, 800), torch.randn(2, 1, 5)
    before = paths(ours, batch=1, steps=2)
    expected = torch.autograd.grad(ours(x)[0].sum(), ours.weight_hh_l0)[0]
    sms = os.environ["FASTRNN_EMULATED_SMS"]
    assert emulator.fastrnn_emulator_set(b"sms", b"1") == 0
    try:
        assert paths(ours, batch=1, steps=2) >= STEPWISE
        actual = torch.autograd.grad(ours(x)[0].sum(), ours.weight_hh_l0)[0]
    finally:
        assert emulator.fastrnn_emulator_set(b"sms", sms.encode()) == 0
    torch.testing.assert_close(actual, expected)
    assert before == (STEPWISE if sms == "4" else PERSISTENT)


def test_weights_beyond_shared_memory_go_step_by_step() -> None:
    assert paths(fastrnn.LSTM(5, 2000), batch=1, steps=2) == STEPWISE


def test_large_batches_go_step_by_step() -> None:
    assert paths(fastrnn.LSTM(5, 256), batch=1500, steps=2) == STEPWISE


# On a device that is too old, or not compiled for, alone.
def test_unfit_devices_are_left_to_torch() -> None:
    ours, x = fastrnn.LSTM(5, 20), torch.randn(4, 3, 5)
    theirs = torch.nn.LSTM(5, 20)
    theirs.load_state_dict(ours.state_dict())
    assert paths(ours, batch=3) == set()
    assert torch.equal(ours(x)[0], theirs(x)[0])
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0], x[:2, 1]])
    assert torch.equal(ours(packed)[0].data, theirs(packed)[0].data)
    reason = r"^fastrnn: (.* compute capability 8\.0|built without code for this GPU)"
    with pytest.raises(RuntimeError, match=reason):
        fastrnn.modules._run(ours, x, None, None, None)


@pytest.mark.parametrize("wish", ["persistent", "stepwise"])
def test_wish(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA_PATH", wish)
    assert paths(fastrnn.LSTM(5, 20), batch=300) == (PERSISTENT if wish[0] == "p" else STEPWISE)
