"""Settings for every test: hypothesis profiles, compilers, and the number of threads."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Draw the same examples at every run, so that a failure can be repeated; `--hypothesis-profile
# explore` looks further.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, max_examples=200, **common)
settings.register_profile("explore", max_examples=1000, **common)
settings.load_profile("repeatable")

# On disk torch keeps compiled graphs by the ops' names: another build's would have its sizes.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Starts each test with one thread; torch.nn crawls where its threads lack cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def threads_as_asked() -> Iterator[None]:
    """Calls take several threads where these lack cores too: three do on a machine with two.

    Not if HEEDS_CORES is set, as test_load.py does.
    """
    torch.ops.fastrnn.heed_cores("HEEDS_CORES" in os.environ)
    yield
    torch.ops.fastrnn.heed_cores(True)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forgets what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
