"""What test_faults.py runs in processes of their own: `python faults_worker.py SCENARIO`."""

import atexit
import faulthandler
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import fastrnn

PAGE = resource.getpagesize()


def memory() -> tuple[int, int]:
    """Returns the bytes of address space and of memory that the process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size, resident, *_ = file.read().split()
    return int(size) * PAGE, int(resident) * PAGE


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """Allows the process `more` bytes of address space beside what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory()[0] + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def train(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of a training step."""
    module.zero_grad()
    y, _ = module(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in module.parameters())]


def run_out_of_memory() -> None:
    """Every allocation of a training step fails in turn, and the next step is right."""
    torch.set_num_threads(2)
    refused = 0
    for module in (fastrnn.LSTM(64, 96, 2, bidirectional=True), fastrnn.RNN(64, 256)):
        x = torch.randn(20, 16, 64)
        expected = train(module, x)
        for pages in range(0, 1600, 80):
            with address_space(pages * PAGE):
                try:
                    results = train(module, x)
                except RuntimeError as error:
                    assert "memory" in str(error), error
                    results = None
                    refused += 1
            gc.collect()
            if results is None:
                results = train(module, x)
            assert all(map(torch.equal, results, expected)), "another result after a failure"
    print(f"{refused} steps were refused memory")
    assert refused > 15


def press(delay: float, ended: threading.Event) -> None:
    """Presses Ctrl-C after `delay` seconds, and again until `ended`.

    Python drops an exception that is raised in a finalizer, and so may drop one Ctrl-C.
    """
    while not ended.wait(delay):
        os.kill(os.getpid(), signal.SIGINT)
        delay = 2.0


def interrupt() -> None:
    """Ctrl-C at any time of a training loop ends it, and the module goes on."""
    torch.set_num_threads(2)
    # A shell ignores Ctrl-C in what it runs in the background, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module, x = fastrnn.LSTM(64, 128), torch.randn(50, 16, 64)
    expected = train(module, x)
    for attempt in range(20):
        ended = threading.Event()
        presser = threading.Thread(target=press, args=(0.01 + 0.003 * attempt, ended))
        try:
            presser.start()
            while True:
                train(module, x)
        except KeyboardInterrupt:
            ended.set()
        presser.join()
        assert all(map(torch.equal, train(module, x), expected))
    assert threading.active_count() == 1


def call_at_exit() -> None:
    """The interpreter's last act."""
    torch.set_num_threads(2)
    module, x = fastrnn.LSTM(64, 128), torch.randn(50, 16, 64)
    expected = train(module, x)

    def last() -> None:
        assert all(map(torch.equal, train(module, x), expected))
        print("called at exit", flush=True)

    atexit.register(last)


def call_often() -> None:
    """100,000 calls of changing shapes; memory stays what it was after a tenth of them."""
    torch.set_num_threads(1)
    modules = [
        fastrnn.LSTM(3, 4),
        fastrnn.LSTM(3, 8, 2, bidirectional=True, proj_size=2),
        fastrnn.RNN(3, 4, batch_first=True),
        fastrnn.RNNCell(3, 4),
    ]
    calls = 100_000
    early, late = [], []
    for i in range(calls):
        module = modules[i % len(modules)]
        x = torch.ones(1 + i % 7, 1 + i % 5, 3) if i % 4 != 3 else torch.ones(1 + i % 9, 3)
        if i % 11 == 0:  # each of them, as 10 would not
            result = module(x)
            (result if i % 4 == 3 else result[0]).sum().backward()
        else:
            with torch.inference_mode():
                module(x)
        if i % 100 == 0:
            if calls // 10 <= i < calls // 5:
                early.append(memory()[1])
            elif i >= calls - calls // 10:
                late.append(memory()[1])
    before, after = sum(early) / len(early), sum(late) / len(late)
    print(f"{before / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    assert after <= 1.02 * before, (before, after)


SCENARIOS = {f.__name__: f for f in (run_out_of_memory, interrupt, call_at_exit, call_often)}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(1500, exit=True)  # where it hangs, if it does
    torch.manual_seed(0)
    SCENARIOS[sys.argv[1]]()
