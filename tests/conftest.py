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
