"""Under load everything ends, with the bits of a single thread.

Seconds of the serving test: FASTRNN_LOAD_SECONDS, 2 unless set.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import fastrnn
from helpers import Case, assert_equal, build, call, cases, make_inputs, run_python, run_tests


@pytest.fixture
def every_core_busy() -> Iterator[None]:
    """Keeps each core busy with another process."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in os.sched_getaffinity(0)
    ]
    try:
        yield
        assert all(process.poll() is None for process in spinning)
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("every_core_busy")
def test_threads_on_a_busy_machine() -> None:
    run_tests("test_threads.py", "-k", "f32 and not matches_torch", HEEDS_CORES="1")


def share_of_others(run: Callable[[], object]) -> float:
    """Of the processor's time of 20 runs, what threads beside the calling one took."""
    process, own = time.process_time(), time.thread_time()
    for _ in range(20):
        run()
    process, own = time.process_time() - process, time.thread_time() - own
    return 1 - own / process


@pytest.mark.parametrize("training", [False, True])
def test_no_thread_waits_for_busy_cores(training: bool, request: pytest.FixtureRequest) -> None:
    """Two threads divide the hidden units, but not once others want the cores."""
    torch.set_num_threads(2)
    module = fastrnn.LSTM(256, 256)
    x = torch.randn(100, 1, 256)

    def step() -> None:
        with torch.inference_mode(not training):
            y, _ = module(x)
        if training:
            torch.autograd.grad(y.sum(), list(module.parameters()))

    if not any(share_of_others(step) > 0.3 for _ in range(100)):
        pytest.skip("the cores are busy already")
    request.getfixturevalue("every_core_busy")
    assert any(share_of_others(step) < 0.05 for _ in range(100))


@pytest.mark.usefixtures("every_core_busy")
def test_threads_wait_for_busy_cores_if_they_are_to() -> None:
    """Else the tests of threads would be of one thread on any machine that is busy."""
    torch.set_num_threads(2)
    module = fastrnn.LSTM(256, 256).requires_grad_(False)
    x = torch.randn(100, 1, 256)
    torch.ops.fastrnn.heed_cores(False)
    try:
        assert any(share_of_others(lambda: module(x)) > 0.3 for _ in range(100))
    finally:
        torch.ops.fastrnn.heed_cores(True)


def run_on_two_threads(training: bool) -> Callable[[], object]:
    """Returns a run of a layer whose steps are too short for cores that are far apart."""
    torch.set_num_threads(2)
    module = fastrnn.LSTM(64, 64).requires_grad_(training)
    x = torch.randn(100, 1, 64)
    return lambda: module(x)[0].sum().backward() if training else module(x)


@pytest.mark.usefixtures("threads_as_asked")
@pytest.mark.parametrize("training", [False, True])
def test_no_thread_waits_for_distant_cores(training: bool) -> None:
    step = run_on_two_threads(training)
    assert any(share_of_others(step) > 0.2 for _ in range(100))
    torch.ops.fastrnn.assume_distant(True)
    assert any(share_of_others(step) < 0.05 for _ in range(100))


def measures_distance(training: bool) -> bool:
    """Whether some of many runs of two threads time their barriers."""
    step = run_on_two_threads(training)
    torch.ops.fastrnn.heed_cores(False)

    def is_measured() -> bool:
        step()
        return torch.ops.fastrnn.measured_distant() is not None

    return any(is_measured() for _ in range(300))


MEASURES_ON_ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import test_load

print(test_load.measures_distance(False))
"""


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) == 1, reason="on one core it is not, as the next test shows"
)
@pytest.mark.usefixtures("threads_as_asked")
@pytest.mark.parametrize("training", [False, True])
def test_distance_is_measured(training: bool) -> None:
    assert measures_distance(training)


@pytest.mark.usefixtures("threads_as_asked")
def test_distance_is_not_measured_on_one_core() -> None:
    """Threads that take turns there would seem as far apart as can be."""
    process = run_python("-c", MEASURES_ON_ONE_CORE, cwd=os.path.dirname(__file__))
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "False"


TURNS_ON_ONE_CORE = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch, fastrnn

torch.ops.fastrnn.heed_cores(False)
module = fastrnn.LSTM(256, 256).requires_grad_(False)
x = torch.randn(100, 1, 256)

def processor_time(threads):
    torch.set_num_threads(threads)
    times = []
    for _ in range(20):
        start = time.process_time()
        module(x)
        times.append(time.process_time() - start)
    return min(times)

together = processor_time(2)
before = time.process_time() - time.thread_time()
module(x)
of_the_other = time.process_time() - time.thread_time() - before
print(together / processor_time(1), of_the_other / together)
"""


def test_threads_on_one_core_take_turns() -> None:
    """They do not spin at each barrier while the other cannot run: that took six times as long."""
    process = run_python("-c", TURNS_ON_ONE_CORE)
    assert process.returncode == 0, process.stderr
    ratio, share_of_the_other = map(float, process.stdout.split())
    assert share_of_the_other > 0.2  # there are two
    assert ratio < 2.5


SERVERS = 16
SERVED = cases(["LSTM"], N=[1], I=[32], H=[64], L=[2], D=[1, 2])
SERVED += cases(["RNN_TANH"], N=[1], I=[32], H=[256], dropout=[0.5], L=[2])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_serving(case: Case, threads: int) -> None:
    """Many Python threads share a module in evaluation, each with sequences of its own."""
    torch.set_num_threads(threads)
    module = build(fastrnn, case).eval()
    lengths = [1, 2, 7, 30, 100]
    requests = [
        make_inputs(Case(**(vars(case) | {"T": T, "hx": seed % 2 == 0})), seed=seed)
        for T in lengths
        for seed in range(4)
    ]
    with torch.inference_mode():
        expected = [call(module, request) for request in requests]
    deadline = time.monotonic() + float(os.environ.get("FASTRNN_LOAD_SECONDS", "2"))
    served, failures = [0] * SERVERS, []

    def serve(server: int) -> None:
        torch.set_num_threads(threads)
        rng = random.Random(server)
        try:
            with torch.inference_mode():
                while served[server] == 0 or time.monotonic() < deadline:
                    i = rng.randrange(len(requests))
                    assert_equal(call(module, requests[i]), expected[i])
                    served[server] += 1
        except BaseException as error:
            failures.append(error)

    servers = [threading.Thread(target=serve, args=(server,)) for server in range(SERVERS)]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    assert not failures, failures[0]
    assert all(served)
