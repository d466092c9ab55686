"""The measured peak: a real one, of the pass alone."""

from __future__ import annotations

import math
import sys

import pytest

from slimgrad.models import get_preset
from slimgrad.train import Cost, measure_gradient
from slimgrad.train import memory as memory_module

MODEL = get_preset("modern").model


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset before the pass on Linux alone")
def test_chunks_take_a_fraction_of_plain_backpropagation() -> None:
    plain = measure_gradient(MODEL, length=2048, chunk=64, method="plain")
    ours = measure_gradient(MODEL, length=2048, chunk=64, method="slimgrad")
    assert plain.peak_bytes is not None
    assert ours.peak_bytes is not None
    layer_inputs = MODEL.layers * 2048 * MODEL.width * 4
    assert plain.peak_bytes > 5 * layer_inputs
    assert ours.peak_bytes < plain.peak_bytes / 3


def test_a_child_that_dies_is_reported_not_raised() -> None:
    cost = measure_gradient(MODEL, length=64, chunk=0, method="slimgrad")
    assert cost.peak_bytes is None
    assert math.isnan(cost.seconds)
    assert "chunk=0" in cost.note


def test_platforms_that_tell_nothing_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimgrad.train import one_gradient

    for module in (memory_module, one_gradient):
        monkeypatch.setattr(module, "proc_status", lambda _: None)
        monkeypatch.setattr(module, "max_resident_bytes", lambda: None)
    assert memory_module.resident_bytes() is None
    task = {"model": {"layers": 1, "width": 8, "heads": 1}, "length": 8, "chunk": 4, "method": "slimgrad", "threads": 1}
    monkeypatch.setattr(one_gradient.torch, "set_num_threads", lambda _: None)
    cost = one_gradient.measure(task)
    assert cost == Cost(peak_bytes=None, seconds=cost.seconds, note="not measured on this platform")
