"""Shared by all tests: Triton's interpreter where there is no GPU, and the backends that can run here."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read by OpenMP when torch is loaded. Threads that spin for work take the cores from the other test process: with it
# the tests take up to twice the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Read by Triton when a kernel is defined, so it must be set before mlhead.kernels is imported anywhere.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` tests are skipped without a GPU, `slow` ones unless chosen with -m."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and "slow" not in (config.getoption("-m") or ""):
            item.add_marker(pytest.mark.skip(reason="slow: run by `make test-all`"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes that a test starts: the order of a sum depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
