"""What slimgrad is held against in the precision experiment is itself right: Algorithm 1 as published, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from slimgrad.models import Performer, PerformerConfig
from slimgrad.paper import precision
from slimgrad.paper.precision import error, measure_drift, plain, subtracted
from slimgrad.states.accumulator import Accumulator

LENGTH = 131
FLOAT64 = "subtracted, float64"


def model() -> Performer:
    torch.manual_seed(0)
    return Performer(PerformerConfig(layers=2, width=16, heads=2)).double()


def tokens() -> torch.Tensor:
    return torch.randint(256, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("chunk", [1, 7, LENGTH - 1, LENGTH, LENGTH + 5])
def test_the_published_algorithm_is_exact_in_float64(chunk: int) -> None:
    # at most 4e-15 was measured
    assert error(subtracted(model(), tokens(), chunk, FLOAT64), plain(model(), tokens())) < 1e-13


def test_a_cut_adjoint_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: no gradient of the state crosses a chunk's edge."""
    advance = precision._Subtracted.advance

    def cut(self: object, delta: torch.Tensor) -> object:
        found = advance(self, delta)
        self.adjoint = None
        return found

    monkeypatch.setattr(precision._Subtracted, "advance", cut)
    assert error(subtracted(model(), tokens(), 16, FLOAT64), plain(model(), tokens())) > 1e-3


def test_subtraction_in_float32_drifts_and_more_with_more_chunks() -> None:
    few, many = (measure_drift(length=length, chunk=64)["drift"] for length in (256, 8192))
    assert 0 < few["subtracted, float32"] < many["subtracted, float32"]
    assert many["slimgrad"] == 0


def test_a_drift_of_slimgrads_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: what is subtracted is off in its last bit."""
    subtract = Accumulator.subtract

    def off(self: Accumulator, delta: torch.Tensor) -> bool:
        return subtract(self, torch.nextafter(delta, torch.full_like(delta, torch.inf)))

    monkeypatch.setattr(Accumulator, "subtract", off)
    # 5.6e-7 was measured
    assert 0 < measure_drift(length=256, chunk=64)["drift"]["slimgrad"] < 1e-5


def test_errors_are_means_over_stretches() -> None:
    def row(stretch: int, plain: float | None, ours: float) -> dict[str, object]:
        task = {"length": 64, "chunks": [16], "stretch": stretch}
        result = {"plain": plain, "ways": {"slimgrad": {"16": ours}}}
        return {
            "experiment": "precision",
            "labels": {"weights": "fresh", "over": "lengths"},
            "task": task,
            "result": result,
        }

    (line,) = precision.compare_precision([row(0, 2.0, 1.0), row(1, 4.0, 8.0)])
    assert (line["stretches"], line["error"], line["plain_float32"]) == (2, 4.5, 3.0)
    assert (line["of_plain_float32"], line["least"], line["most"]) == (1.5, 0.5, 2.0)
    (line,) = precision.compare_precision([row(0, None, 1.0)])  # where plain backpropagation does not fit
    assert line["error"] == 1.0
    assert math.isnan(line["of_plain_float32"])
