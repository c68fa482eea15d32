"""Settings for every test: hypothesis profiles and the number of threads."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Draw the same examples at every run, so that a failure can be repeated; `--hypothesis-profile
# explore` looks further.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, max_examples=60, **common)
settings.register_profile("explore", max_examples=1000, **common)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Starts each test with one thread; torch.nn crawls where its threads lack cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forgets what other tests compiled, and other builds: torch keeps graphs by ops' names."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()
