"""Inputs and targets that are not the same in both sweeps are refused by name, wherever they come from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimgrad as sg
from tests.call.reading import (
    CHUNK,
    FORWARD,
    SCHEDULES,
    SIGNALS,
    TARGETS,
    TOKENS,
    WAYS,
    Reading,
    Reads,
    build,
    gradients,
    pairs,
    require_same,
    segment,
    values,
    with_metrics,
)
from tests.toy_models import AllKinds, GatedRecurrence, Signals


class Lying(Reading):
    """Gives one other number, once it has been asked `truths` times."""

    def __init__(self, whole: Any, truths: int, leaf: str = "") -> None:
        super().__init__(whole)
        self.truths, self.leaf = truths, leaf

    def read(self, start: int, stop: int) -> Any:
        given = super().read(start, stop)
        if len(self.log) > self.truths:
            changed = given[self.leaf] if self.leaf else given
            changed[0, 0] = (changed[0, 0] + 1) % 5
        return given


REFUSED = "other values were read than in the first sweep, so the gradient would belong to neither. Expected the same"


@pytest.mark.parametrize("truths", [3, 4, 5])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("way", ["loss", "token_loss", "outputs"])
def test_a_reader_that_gives_other_inputs(way: str, schedule: sg.Schedule, truths: int) -> None:
    model = build(AllKinds)
    where = {3: "32 to 39", 4: "16 to 31", 5: "0 to 15"}[truths] if schedule == sg.Rebuild() else r"\d+ to \d+"
    with pytest.raises(sg.ConsumedError, match=f"^inputs, tokens {where}: {REFUSED}"):
        WAYS[way](model, Lying(TOKENS, truths), None, chunk=CHUNK, schedule=schedule)
    assert gradients(model) == [None] * len(list(model.parameters()))


@pytest.mark.parametrize(("truths", "where"), [(3, "16 to 31"), (4, "0 to 15")])
def test_a_reader_that_gives_other_inputs_to_backward(truths: int, where: str) -> None:
    """Which reads the last chunk once."""
    model = build(AllKinds)
    with pytest.raises(sg.ConsumedError, match=f"^inputs, tokens {where}: {REFUSED}"):
        sg.backward(model, Lying(TOKENS, truths), chunk=CHUNK)
    assert gradients(model) == [None] * len(list(model.parameters()))


@pytest.mark.parametrize("way", ["backward", "loss", "token_loss"])
def test_a_reader_that_gives_other_targets(way: str) -> None:
    """In `backward` the first sweep has counted them, so they are compared as well."""
    model = build(AllKinds)
    with pytest.raises(sg.ConsumedError, match=rf"^targets, tokens \d+ to \d+: {REFUSED}"):
        WAYS[way](model, TOKENS, Lying(TARGETS, 4), chunk=CHUNK)
    assert gradients(model) == [None] * len(list(model.parameters()))


def test_the_leaf_that_differs_is_named() -> None:
    with pytest.raises(sg.ConsumedError, match=rf"^inputs \['right'\], tokens 32 to 39: {REFUSED}"):
        sg.loss(build(Signals), Lying(SIGNALS, 3, "right"), TARGETS, chunk=CHUNK).backward()


@pytest.mark.parametrize("name", ["inputs", "targets"])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_changed_through_numpy_between_the_sweeps(name: str, mapped: bool, tmp_path: Path) -> None:
    """torch sees no write: no version is counted."""
    x = TOKENS.numpy() if name == "inputs" else TARGETS.numpy()
    array = np.memmap(tmp_path / "file", dtype=x.dtype, mode="w+", shape=x.shape) if mapped else np.empty_like(x)
    array[:] = x
    given = torch.from_numpy(array)
    inputs, targets = (given, TARGETS) if name == "inputs" else (TOKENS, given)
    model = build(AllKinds)
    before = sg.loss(model, inputs, targets, chunk=CHUNK)
    array[0, 20] = (array[0, 20] + 1) % 5
    with pytest.raises(sg.ConsumedError, match=f"^{name}, tokens 16 to 31: {REFUSED}"):
        before.backward()
    assert gradients(model) == [None] * len(list(model.parameters()))

    def change(event: sg.Event) -> None:
        array[0, 5] = (array[0, 5] + 1) % 5

    if name == "inputs":  # targets in memory are read once by `backward`
        with pytest.raises(sg.ConsumedError, match=f"^inputs, tokens 0 to 15: {REFUSED}"):
            sg.backward(model, inputs, targets, chunk=CHUNK, on_chunk=change)


def test_a_tensor_that_is_written_to_before_its_backward() -> None:
    tokens = TOKENS.clone()
    before = sg.loss(build(AllKinds), tokens, chunk=CHUNK)
    tokens[0, 0] = 5
    with pytest.raises(sg.ConsumedError, match=r"an input, a target or a state was modified between"):
        before.backward()


def test_what_is_read_once_may_change() -> None:
    """In a list, a document that is done."""
    arrays = [TOKENS.numpy().copy() for _ in range(2)]
    model = build(AllKinds)
    expected = sg.backward(model, [TOKENS, TOKENS], chunk=CHUNK)
    wanted = gradients(model)
    seen: list[int] = []

    def change(event: sg.Event) -> None:
        seen.append(event.start)
        if len(seen) == 6:
            arrays[0][:] = 0

    found = sg.backward(model, [torch.from_numpy(x) for x in arrays], chunk=CHUNK, on_chunk=change)
    require_same([found.loss, *gradients(model)], [expected.loss, *wanted])


# --- and in another process ---


@pytest.mark.parametrize("kind", [AllKinds, GatedRecurrence])
@pytest.mark.parametrize("saved", range(6))
def test_a_segment_of_readers_is_saved_and_goes_on(kind: type[nn.Module], saved: int, tmp_path: Path) -> None:
    """After any chunk. Of what was read before the save nothing is read for the count again."""
    model, events = build(kind), list[sg.Event]()
    expected = segment(model, TOKENS, TARGETS, chunk=CHUNK) + gradients(model)

    class StoppedError(Exception):
        pass

    def stop(event: sg.Event) -> None:
        events.append(event)
        if len(events) == saved:
            one.save(tmp_path)
            raise StoppedError

    one = sg.Segment(model, Reading(TOKENS), Reading(TARGETS), chunk=CHUNK, loss_fn=with_metrics, on_chunk=stop)
    if saved == 0:
        one.save(tmp_path)
    else:
        with suppress(StoppedError):
            one.forward()
            one.reverse()
        assert len(events) == saved
    log: Reads = []
    inputs, targets = Reading(TOKENS, "x", log), Reading(TARGETS, "y", log)
    again = sg.Segment.load(tmp_path, model, inputs, targets, loss_fn=with_metrics)
    final = again.forward()
    result = again.reverse()
    found = [result.loss, result.num_targets, result.metrics["wrong"], *values(final)]
    require_same(found + gradients(model), expected)
    assert log == (pairs(FORWARD) + pairs(FORWARD[::-1]))[2 * saved :]


def test_a_segment_goes_on_with_other_numbers(tmp_path: Path) -> None:
    model = build(AllKinds)
    one = sg.Segment(model, Reading(TOKENS), Reading(TARGETS), chunk=CHUNK)
    one.forward()
    one.save(tmp_path)
    for inputs, targets, name in (
        (Lying(TOKENS, 0), Reading(TARGETS), "inputs"),
        (Reading(TOKENS), Lying(TARGETS, 0), "targets"),
    ):
        again = sg.Segment.load(tmp_path, model, inputs, targets)
        with pytest.raises(sg.ConsumedError, match=f"^{name}, tokens 32 to 39: {REFUSED}"):
            again.reverse()
    assert gradients(model) == [None] * len(list(model.parameters()))
