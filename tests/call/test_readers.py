"""Whole gradients from readers and mapped files: the bits that tensors give, and what is asked for in which order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.call.reading import (
    BATCH,
    CHUNK,
    FORWARD,
    SCHEDULES,
    SIGNALS,
    TARGETS,
    TIME,
    TOKENS,
    WAYS,
    Reading,
    Reads,
    backward,
    build,
    gradients,
    pairs,
    require_same,
)
from tests.toy_models import AllKinds, LinearAttention, Signals

# --- the same bits ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("kind", "inputs", "targets"),
    [(AllKinds, TOKENS, None), (LinearAttention, TOKENS.to(torch.int32), TARGETS), (Signals, SIGNALS, TARGETS)],
    ids=["next tokens", "targets", "floats in a dict"],
)
def test_readers_give_what_tensors_give(
    kind: type[nn.Module], inputs: Any, targets: Any, schedule: sg.Schedule, way: str
) -> None:
    """Inputs, targets, or both."""
    model = build(kind)
    expected = WAYS[way](model, inputs, targets, chunk=CHUNK, schedule=schedule) + gradients(model)
    streams = Reading(inputs), None if targets is None else Reading(targets)
    for x, y in itertools.product((inputs, streams[0]), {targets, streams[1]}):
        found = WAYS[way](model, x, y, chunk=CHUNK, schedule=schedule)
        require_same(found + gradients(model), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mapped", ["torch.from_file", "np.memmap"])
def test_mapped_files_give_what_tensors_give(way: str, mapped: str, tmp_path: Path) -> None:
    """Bytes with the tokens after them as targets, and floats in a dict."""
    tokens = TOKENS.to(torch.uint8)

    def map_file(x: Tensor, name: str) -> Tensor:
        x.numpy().tofile(tmp_path / name)
        if mapped == "np.memmap":
            array = np.memmap(tmp_path / name, dtype=x.numpy().dtype, mode="r+", shape=tuple(x.shape))
            return torch.from_numpy(array)
        return torch.from_file(str(tmp_path / name), shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)

    signals = {name: map_file(x, name) for name, x in SIGNALS.items()}
    for kind, given, whole, targets in (
        (AllKinds, map_file(tokens, "tokens").long, tokens.long, None),
        (LinearAttention, lambda: map_file(TOKENS, "long"), lambda: TOKENS, None),
        (Signals, lambda: signals, lambda: SIGNALS, map_file(TARGETS, "targets")),
    ):
        model = build(kind)
        expected = WAYS[way](model, whole(), None if targets is None else TARGETS, chunk=CHUNK, schedule=sg.Keep())
        expected += gradients(model)
        found = WAYS[way](model, given(), targets, chunk=CHUNK, schedule=sg.Keep())
        require_same(found + gradients(model), expected)


@pytest.mark.parametrize("way", ["backward", "loss", "evaluate"])
def test_lists_of_readers(way: str) -> None:
    model = build(AllKinds)
    documents = [TOKENS[:, :23], TOKENS, TOKENS[:, 5:9]]
    goals = [TARGETS[:, :23], TARGETS, TARGETS[:, 5:9]]
    run = {"backward": sg.backward, "loss": sg.loss, "evaluate": sg.evaluate}[way]

    def found(documents: Any, goals: Any) -> list[Any]:
        result = run(model, documents, goals, chunk=CHUNK)
        if way == "loss":
            result.backward()
            return [result, *gradients(model)]
        return [result.loss, result.num_targets, *gradients(model)]

    for targets in (None, goals):
        expected = found(documents, targets)
        readers = None if targets is None else [Reading(x) for x in targets]
        require_same(found([Reading(x) for x in documents], readers), expected)


@pytest.mark.parametrize("normalizer", [7, torch.tensor(3.5)])
def test_a_number_to_divide_by(normalizer: Any) -> None:
    model = build(LinearAttention)
    expected = backward(model, TOKENS, TARGETS, chunk=CHUNK, normalizer=normalizer) + gradients(model)
    found = backward(model, Reading(TOKENS), Reading(TARGETS), chunk=CHUNK, normalizer=normalizer)
    require_same(found + gradients(model), expected)


def test_targets_that_no_reader_counts() -> None:
    """Floating targets: each step counts, as in a tensor."""

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum()

    model, goals = build(Signals), torch.linspace(0, 1, BATCH * TIME * 5).reshape(BATCH, TIME, 5)
    expected = sg.backward(model, SIGNALS, goals, chunk=CHUNK, loss_fn=squares)
    wanted = gradients(model)
    found = sg.backward(model, SIGNALS, Reading(goals), chunk=CHUNK, loss_fn=squares)
    assert found.num_targets == expected.num_targets == BATCH * TIME
    require_same([found.loss, *gradients(model)], [expected.loss, *wanted])


# --- what is asked for ---

AHEAD = [("x", 0, 17), ("x", 16, 33), ("x", 32, 40)]  # with the token that follows


@pytest.mark.parametrize(
    ("way", "next_tokens", "with_targets"),
    [
        # the last chunk is reversed straight away; the first sweep, which needs no targets, reads them to count them
        ("backward", FORWARD[:2] + AHEAD[::-1], [*pairs(FORWARD[:2]), ("y", 32, 40), *pairs(FORWARD[::-1])]),
        ("loss", AHEAD + AHEAD[::-1], pairs(FORWARD) + pairs(FORWARD[::-1])),
        ("token_loss", AHEAD + AHEAD[::-1], pairs(FORWARD) + pairs(FORWARD[::-1])),
        ("outputs", FORWARD + FORWARD[::-1], FORWARD + FORWARD[::-1]),
        ("evaluate", AHEAD, pairs(FORWARD)),
    ],
)
def test_the_order_of_reads(way: str, next_tokens: list[Any], with_targets: list[Any]) -> None:
    log: Reads = []
    options = {"chunk": CHUNK, "schedule": sg.Rebuild()}
    WAYS[way](build(LinearAttention), Reading(TOKENS, "x", log), None, **options)
    assert log == next_tokens
    log.clear()
    WAYS[way](build(LinearAttention), Reading(TOKENS, "x", log), Reading(TARGETS, "y", log), **options)
    assert log == with_targets


def test_a_number_to_divide_by_saves_the_read_that_counts() -> None:
    log: Reads = []
    result = sg.backward(
        build(LinearAttention), Reading(TOKENS, "x", log), Reading(TARGETS, "y", log), chunk=CHUNK, normalizer=1
    )
    assert log == pairs(FORWARD[:2]) + pairs(FORWARD[::-1])
    assert result.num_targets == int((TARGETS != -100).sum())


def test_a_list_counts_before_the_first_reverse_sweep() -> None:
    """The gradient of the first document's loss needs the number of all targets: one read of them, not of inputs."""
    log: Reads = []
    inputs, targets = ([Reading(x, name, log) for name in names] for x, names in ((TOKENS, "ab"), (TARGETS, "yz")))
    sg.backward(build(LinearAttention), inputs, targets, chunk=CHUNK)
    asked = {name: [span for who, *span in log if who == name] for name in "abyz"}
    back = [[32, 40], [16, 32], [0, 16]]
    assert asked["a"] == asked["b"] == [[0, 16], [16, 32], *back]
    assert asked["y"] == [[0, 16], [16, 32], [32, 40], *back]
    assert asked["z"] == [*back[::-1], [0, 16], [16, 32], *back]


def test_a_schedule_asks_again_for_what_it_advances_again() -> None:
    log: Reads = []
    sg.backward(build(LinearAttention), Reading(TOKENS, "x", log), chunk=CHUNK, schedule=sg.Binomial(1))
    assert log == [*FORWARD[:2], AHEAD[2], FORWARD[0], AHEAD[1], AHEAD[0]]


def test_nothing_is_asked_for_before_the_first_chunk() -> None:
    reader = Reading(TOKENS)
    one = sg.Segment(build(LinearAttention), reader, chunk=CHUNK)
    assert reader.log == []
    one.forward()
    assert reader.log == [("", 0, 16), ("", 16, 32), ("", 32, 40)]


# --- errors ---


class OutOfReachError(Exception):
    """A disk that is gone."""


@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_the_error_of_a_reader_is_its_own(name: str, call: int) -> None:
    class Broken(Reading):
        def read(self, start: int, stop: int) -> Any:
            given = super().read(start, stop)
            if len(self.log) == call:
                raise OutOfReachError(f"{start} to {stop}")
            return given

    model = build(AllKinds)
    given = (Broken(TOKENS), TARGETS) if name == "inputs" else (TOKENS, Broken(TARGETS))
    generator = torch.random.get_rng_state()
    with pytest.raises(OutOfReachError):
        sg.backward(model, *given, chunk=CHUNK)
    assert gradients(model) == [None] * len(list(model.parameters()))
    assert not torch.equal(torch.random.get_rng_state(), generator)  # one draw, the call's own
    expected = backward(model, TOKENS, TARGETS, chunk=CHUNK) + gradients(model)
    require_same(backward(model, *given, chunk=CHUNK) + gradients(model), expected)


def test_a_reader_of_no_tensors_is_refused_in_the_sweep() -> None:
    class Numbers(Reading):
        def read(self, start: int, stop: int) -> Any:
            return super().read(start, stop).numpy()

    model = build(AllKinds)
    with pytest.raises(sg.InputError, match=r"inputs: read\(0, 16\): expected a tensor .* got a ndarray"):
        sg.backward(model, Numbers(TOKENS), chunk=CHUNK)
