"""Every test of this folder is marked `cuda`, and skipped where the device is not there."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.cuda.device import DEVICE, IS_CUDA, place_toys

_HERE = Path(__file__).parent
_missing = pytest.mark.skipif(
    IS_CUDA and not torch.cuda.is_available(), reason="no CUDA device (SLIMGRAD_TEST_DEVICE=cpu runs these on the CPU)"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            item.add_marker(_missing)


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Autograd's thread of the device meets cuBLAS for the first time here, where its warning fails no test."""
    if torch.cuda.is_available() and IS_CUDA:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.ones(8, 8, device=DEVICE, requires_grad=True)
            (x @ x).sum().backward()
            torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _placed(monkeypatch: pytest.MonkeyPatch) -> None:
    place_toys(monkeypatch)
