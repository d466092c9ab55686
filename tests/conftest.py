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
    """One thread and gradients again, whatever the test before left.

    A resumed run brings its own number of threads; a signal that comes just as `torch.no_grad` ends may leave gradients
    off.
    """
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
