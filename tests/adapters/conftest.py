"""What the tests of adapters share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba blocks round two of their parameters to float32; here they do not, so that the comparison is sharp."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
