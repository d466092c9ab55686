"""A chunk waits for its device once: whatever must be looked at on the host is fetched together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimgrad as sg
from slimgrad.models import Cached, Gated, Performer, PerformerConfig, Windowed
from slimgrad.states.accumulator import Accumulator
from slimgrad.sweep import progress
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

SHIPPED = [
    partial(Performer, PerformerConfig(layers=2, width=16, heads=2, vocabulary=13)),
    partial(Gated, width=6, vocabulary=13),
    partial(Windowed, width=6, window=17),
    partial(Cached, width=6),
]
TOKENS = torch.arange(2 * 96).reshape(2, 96) * 7 % 13
# the last is what torch.tensor does: on a device a copy from memory of the host's that it cannot leave under way
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "masked_select", "lift_fresh"}


class Waits(TorchDispatchMode):
    """Notes operations whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits(model: nn.Module, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """For each chunk that ran: how often numbers were fetched, and what else waited."""
    fetched, rows = [0], list[tuple[int, list[str]]]()
    fetch = progress.fetch

    def counting(numbers: Any) -> Any:
        fetched[0] += 1
        return fetch(numbers)

    monkeypatch.setattr(progress, "fetch", counting)
    events: list[tuple[int, int]] = []
    with Waits() as mode:
        way(model, TOKENS, chunk=8, on_chunk=lambda event: events.append((fetched[0], len(mode.seen))))
    for (before, start), (after, stop) in zip([(1, 0), *events], events, strict=False):
        rows.append((after - before, mode.seen[start:stop]))
    return rows


@pytest.mark.parametrize("model", [LinearAttention, CachedAttention, GatedRecurrence, AllKinds, *SHIPPED])
def test_one_synchronisation_a_chunk(model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = waits(model(), sg.backward, monkeypatch)
    forward, back = rows[:11], rows[11:]
    assert len(back) == 12
    # not the first ones, in which the quanta of sums widen, and the model's methods are looked at; not the very last,
    # in which they narrow again
    assert forward[4:] == [(1, [])] * 7
    # on_chunk itself asks for the loss and for the norm of the adjoint
    assert back[1:-1] == [(1, ["_local_scalar_dense"] * 2)] * 10


def test_a_synchronisation_for_each_sum_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Accumulator.add

    def eager(self: Accumulator, delta: torch.Tensor) -> None:
        add(self, delta)
        self.settle()

    monkeypatch.setattr(Accumulator, "add", eager)
    assert waits(LinearAttention(), sg.backward, monkeypatch)[6] == (1, ["_local_scalar_dense"])
