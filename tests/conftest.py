"""For every test: one thread (pytest-xdist brings the processes), a fixed seed, hypothesis without surprises."""

from __future__ import annotations

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# derandomized: the same examples on every run; no deadline: a busy machine is not a failure
hypothesis.settings.register_profile("slimgrad", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("slimgrad")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup() -> None:
    """One thread again, whatever the test before left: a run that is resumed here brings its own number with it."""
    torch.set_num_threads(1)
