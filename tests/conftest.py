"""What all tests share."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch as th

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One torch thread, unless a test asks for more: small networks gain nothing from several."""
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(n_threads)
