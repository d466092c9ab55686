"""What slimgrad is held against in the precision experiment is itself right: Algorithm 1 as published, in float64."""

from __future__ import annotations

import pytest
import torch

from slimgrad.experiments import precision
from slimgrad.experiments.precision import error, measure_drift, plain, subtracted
from slimgrad.models import Performer, PerformerConfig

LENGTH = 131


def model() -> Performer:
    torch.manual_seed(0)
    return Performer(PerformerConfig(layers=2, width=16, heads=2)).double()


def tokens() -> torch.Tensor:
    return torch.randint(256, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("chunk", [1, 7, LENGTH - 1, LENGTH, LENGTH + 5])
def test_the_published_algorithm_is_exact_in_float64(chunk: int) -> None:
    # at most 4e-15 was measured
    assert error(subtracted(model(), tokens(), chunk, torch.float64), plain(model(), tokens())) < 1e-13


def test_a_cut_adjoint_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: no gradient of the state crosses a chunk's edge."""
    advance = precision._Subtracted.advance

    def cut(self: object, delta: torch.Tensor) -> object:
        found = advance(self, delta)
        self.adjoint = None
        return found

    monkeypatch.setattr(precision._Subtracted, "advance", cut)
    assert error(subtracted(model(), tokens(), 16, torch.float64), plain(model(), tokens())) > 1e-3


def test_subtraction_in_float32_drifts_and_more_with_more_chunks() -> None:
    few, many = (measure_drift(length=length, chunk=64)["drift"] for length in (256, 8192))
    assert 0 < few["subtracted, float32"] < many["subtracted, float32"]
    assert many["slimgrad"] == 0
