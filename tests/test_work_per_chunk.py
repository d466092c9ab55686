"""What one more chunk costs, counted and not timed: a change that makes chunks dearer has to say so here.

Two sweeps over the same model differ by some chunks; the difference, over their number, is what a chunk takes. The
limits are what was counted when this was written, plus a twentieth for other versions of torch and Python. Where a
change makes a chunk cheaper, the limit comes down with it: a count more than a fifth below its limit fails as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.measure import flops_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimgrad as sg
from slimgrad.budget.live import LiveBytes
from slimgrad.models import Performer, PerformerConfig
from slimgrad.models.cached import Cached
from slimgrad.models.gated import Gated

CHUNK, FEW, MANY = 16, 6, 14


class Operations(TorchDispatchMode):
    """How many operations torch carries out."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operations(work: Callable[[], None]) -> int:
    with Operations() as counted:
        work()
    return counted.number


def made_bytes(work: Callable[[], None]) -> int:
    with LiveBytes([1]) as counted:
        work()
    return counted.made_large


def saved_bytes(work: Callable[[], None]) -> int:
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        total += x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work()
    return total


def python_calls(work: Callable[[], None]) -> int:
    total = 0

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal total
        total += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return total


COUNTS = {
    "operations": operations,
    "flops": flops_of,
    "bytes made": made_bytes,
    "bytes saved": saved_bytes,
    "python calls": python_calls,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Performer": lambda: Performer(PerformerConfig(layers=2, width=32, heads=2)),
    "gates": lambda: Gated(32),
    "cache": lambda: Cached(32),
}
LIMITS: dict[str, dict[str, float]] = {
    "Performer": {
        "operations": 893, "flops": 3888128, "bytes made": 493692, "bytes saved": 127236, "python calls": 3304,
    },
    "gates": {
        "operations": 259, "flops": 1376256, "bytes made": 528308, "bytes saved": 121476, "python calls": 1082,
    },
    "cache": {  # of chunks 7 to 14: its attention grows with what is before them
        "operations": 210, "flops": 2785280, "bytes made": 428108, "bytes saved": 103684, "python calls": 1069,
    },
}  # fmt: skip


def per_chunk(model: nn.Module, count: Callable[[Callable[[], None]], int]) -> float:
    def swept(chunks: int) -> int:
        tokens = torch.arange(chunks * CHUNK)[None] % 250
        model.zero_grad(set_to_none=False)
        sg.backward(model, tokens, chunk=CHUNK, schedule=sg.Rebuild())  # what happens once has happened
        return count(lambda: sg.backward(model, tokens, chunk=CHUNK, schedule=sg.Rebuild()) and None)

    return (swept(MANY) - swept(FEW)) / (MANY - FEW)


@pytest.mark.parametrize("what", COUNTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_chunk_costs_no_more_than_it_did(name: str, what: str) -> None:
    torch.manual_seed(0)
    found, limit = per_chunk(MODELS[name](), COUNTS[what]), LIMITS[name][what]
    assert found <= limit * 1.05, f"{found:,.1f} {what} a chunk, {limit:,.1f} before"
    assert found >= limit * 0.8, f"{found:,.1f} {what} a chunk: put that in the place of {limit:,.1f}"


def test_a_wasted_operation_is_counted() -> None:
    """The planted fault: a chunk that copies its inputs once more."""

    class Wasteful(Performer):
        def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
            return super().forward(inputs.clone().clone().clone(), state)

    config = PerformerConfig(layers=2, width=32, heads=2)
    for what, least in (("operations", 3), ("bytes made", 3 * CHUNK * 8)):
        count = COUNTS[what]
        assert per_chunk(Wasteful(config), count) >= per_chunk(Performer(config), count) + least
