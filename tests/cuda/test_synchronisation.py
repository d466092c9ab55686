"""How often a chunk waits for the device, and what leaves it.

On CUDA torch itself says when it waits (`set_sync_debug_mode`); on a CPU the operations that would are counted.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import slimgrad as sg
from slimgrad.sweep import progress
from slimgrad.sweep.run import Run
from slimgrad.sweep.schedules.base import Kind
from tests.cuda.device import DEVICE, IS_CUDA, MODELS, PLACES, every_model, on_cuda_only, on_device
from tests.sweep.test_synchronisation import Waits

CHUNK = 8
NAMES = [name for name in MODELS if name not in ("growing sums", "sums of all sizes")]  # their quanta keep widening


def waits(
    name: str, monkeypatch: pytest.MonkeyPatch, *, host: bool, schedule: sg.Schedule
) -> list[tuple[Kind, int, int]]:
    """For each move of a plan: its kind, where it begins, how often it waited."""
    model, inputs, targets = on_device(MODELS[name])()
    model, inputs = model.float(), pytree.tree_map(lambda x: x.float() if x.is_floating_point() else x, inputs)
    if host:
        inputs = pytree.tree_map(lambda x: x.cpu(), inputs)
    seen: list[int] = [0]
    rows: list[tuple[Kind, int, int]] = []
    fetch, go_on = progress.fetch, Run._go_on

    with warnings.catch_warnings(record=True) as said, Waits() as mode:
        warnings.simplefilter("always")

        def so_far() -> int:
            if IS_CUDA:
                return sum("called a synchronizing CUDA operation" in str(w.message) for w in said)
            return seen[0] + len(mode.seen)

        def counting(numbers: Any) -> Any:
            seen[0] += 1
            return fetch(numbers)

        def moving(self: Run, head: bool, cotangents: Any) -> None:
            move, before = self.progress.moves.next(), so_far()
            go_on(self, head, cotangents)
            assert move is not None
            rows.append((move.kind, move.span.start, so_far() - before))

        monkeypatch.setattr(progress, "fetch", counting)
        monkeypatch.setattr(Run, "_go_on", moving)
        if IS_CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            sg.backward(model, inputs, targets, chunk=CHUNK, schedule=schedule)
        finally:
            if IS_CUDA:
                torch.cuda.set_sync_debug_mode("default")
    return rows


@pytest.mark.parametrize("host", [False, True], ids=["inputs on the device", "inputs in host memory"])
@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Keep(), sg.Binomial(3)], ids=["Rebuild", "Keep", "Binomial"])
@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_waits_once(name: str, schedule: sg.Schedule, host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = waits(name, monkeypatch, host=host, schedule=schedule)
    # not in the first chunks, where quanta widen (and narrow again) and the model's methods are looked at
    advances = [n for kind, start, n in rows if kind is Kind.ADVANCE and start >= 4 * CHUNK]
    reverses = [n for kind, start, n in rows if kind is Kind.REVERSE and start >= 4 * CHUNK]
    kept = [n for kind, _, n in rows if kind in (Kind.STORE, Kind.LOAD, Kind.FREE)]
    print(f"{name} {schedule}: advance {[*set(advances)]}, reverse {[*set(reverses)]}, store and load {[*set(kept)]}")
    assert len(reverses) == 13
    assert max(advances) <= 1
    assert max(reverses[1:]) <= 1  # in the first one a model with an `advance` runs its forward for the first time
    assert max(kept, default=0) == 0


@on_cuda_only
@pytest.mark.parametrize("store", PLACES[1:])
@pytest.mark.parametrize("name", ["gated", "linear attention", "all kinds"])
def test_states_kept_elsewhere_wait_little(name: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host not at all, on a disk once for each leaf."""
    rows = waits(name, monkeypatch, host=False, schedule=sg.Keep(store=store))
    leaves = len(pytree.tree_leaves(MODELS[name]()[0].initial_state(2)))
    for kind in (Kind.STORE, Kind.LOAD):
        counts = Counter(n for k, _, n in rows if k is kind)
        print(f"{name} {store} {kind.name}: {dict(counts)} for {leaves} leaves")
        assert max(counts) <= (0 if store == "host" else leaves)  # pinned memory is copied on the stream


class Leaving(TorchDispatchMode):
    """Notes what comes from the device to the host, by its number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        came = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device.type != "cpu" for x in came):
            for x in pytree.tree_leaves(found):
                if isinstance(x, Tensor) and x.device.type == "cpu":
                    self.sizes.append((func.overloadpacket.__name__, x.numel()))
        return found


@every_model
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_states_stay_on_the_device(name: str, way: str) -> None:
    model, inputs, targets = on_device(MODELS[name])()
    with Leaving() as mode:
        if way == "backward":
            sg.backward(model, inputs, targets, chunk=16, schedule=sg.Keep())
        else:
            sg.loss(model, inputs, targets, chunk=16, schedule=sg.Keep()).backward()
    # what is fetched together: a checksum and a number for each leaf, for what was read, for the loss; and the samples
    # of weights in the first chunk
    assert max((n for _, n in mode.sizes), default=0) <= 16 * len([*model.parameters()]), mode.sizes


def test_a_state_that_leaves_would_show() -> None:
    with Leaving() as mode:
        torch.ones(1000, device=DEVICE).cpu()
    assert mode.sizes == ([("_to_copy", 1000)] if IS_CUDA else [])
