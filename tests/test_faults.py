"""Out of memory, interrupts, other processes, the interpreter's end, and memory over many calls."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastrnn
from helpers import run_python

WORKER = Path(__file__).with_name("faults_worker.py")


@pytest.mark.parametrize("scenario", ["run_out_of_memory", "interrupt", "call_often"])
def test_in_a_process_of_its_own(scenario: str) -> None:
    # What is freed goes back to the system at once, and is asked for again.
    env = {"MALLOC_ARENA_MAX": "1"}
    if scenario == "run_out_of_memory":
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = run_python(str(WORKER), scenario, **env)
    assert result.returncode == 0, result.stdout + result.stderr


def test_use_from_an_atexit_handler() -> None:
    result = run_python(str(WORKER), "call_at_exit")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "called at exit\n"


class Gradients(Dataset):
    """Gradients that the process which loads them computes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = torch.randn(20, 8, 64, generator=torch.Generator().manual_seed(index))
        self.module.zero_grad()
        self.module(x)[0].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in self.module.parameters()])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", [fastrnn.RNN, fastrnn.LSTM])
def test_training_in_loader_workers(kind: Any, method: str) -> None:
    """After the threads of this process have been used."""
    torch.set_num_threads(2)
    data = Gradients(kind(64, 128))
    with torch.no_grad():
        data.module(torch.randn(20, 8, 64))
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method)
    loaded = list(loader)
    assert all(torch.equal(gradient, data[i]) for i, gradient in enumerate(loaded))


def infer_with_two_threads(module: nn.Module, x: Tensor, queue: Any) -> None:
    """Puts the result into the queue, as bytes that need no shared memory."""
    torch.set_num_threads(2)
    with torch.no_grad():
        queue.put(module(x)[0].numpy().tobytes())


def test_threads_in_a_spawned_process() -> None:
    torch.set_num_threads(2)
    module, x = fastrnn.LSTM(64, 128), torch.randn(50, 16, 64)
    with torch.no_grad():
        expected = module(x)[0].numpy().tobytes()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=infer_with_two_threads, args=(module, x, queue))
    process.start()
    assert queue.get(timeout=600) == expected
    process.join()
    assert process.exitcode == 0
