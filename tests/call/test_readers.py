"""Whole gradients from readers and mapped files: the bits that tensors give, asked for in a known order, or refused."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.call.losses import cross_entropy_sum
from tests.toy_models import AllKinds, GatedRecurrence, LinearAttention, Signals

BATCH, TIME, CHUNK = 2, 40, 16  # chunks of 16, 16 and 8
TOKENS = torch.arange(BATCH * TIME).reshape(BATCH, TIME) * 7 % 13
TARGETS = torch.where(torch.arange(TIME) % 5 == 3, -100, TOKENS * 3 % 5)  # 64 that count
SIGNALS = {
    "left": torch.linspace(-1, 1, BATCH * TIME * 3).reshape(BATCH, TIME, 3).sin(),
    "right": torch.linspace(-1, 1, BATCH * TIME * 3).reshape(BATCH, TIME, 3).exp(),
}
SCHEDULES = [sg.Rebuild(), sg.Every(2), sg.Binomial(1)]


class Reading:
    """Gives the spans of a tree by filling one buffer anew, and notes which it was asked for."""

    def __init__(self, whole: Any, name: str = "", log: list[tuple[str, int, int]] | None = None) -> None:
        self.whole, self.name, self.log = whole, name, [] if log is None else log
        self.buffer = pytree.tree_map(torch.empty_like, whole)

    @property
    def length(self) -> int:
        return pytree.tree_leaves(self.whole)[0].shape[1]

    @property
    def batch(self) -> int:
        return pytree.tree_leaves(self.whole)[0].shape[0]

    def read(self, start: int, stop: int) -> Any:
        self.log.append((self.name, start, stop))
        pytree.tree_map(lambda b, x: b[:, : stop - start].copy_(x[:, start:stop]), self.buffer, self.whole)
        return pytree.tree_map(lambda b: b[:, : stop - start], self.buffer)


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind()


def values(state: Any) -> list[Tensor]:
    return [getattr(leaf, "value", leaf) for leaf in pytree.tree_leaves(state) if not isinstance(leaf, int)]


def with_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    wrong = (outputs.argmax(-1) != targets) & (targets >= 0)
    return {"loss": cross_entropy_sum(outputs, targets), "wrong": wrong.sum()}


def backward(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    result = sg.backward(model, inputs, targets, loss_fn=with_metrics, **options)
    return [result.loss, result.num_targets, result.metrics["wrong"], *values(result.final_state)]


def loss(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    found = sg.loss(model, inputs, targets, **options)
    found.backward()
    return [found]


def token_loss(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    losses = sg.token_loss(model, inputs, targets, **options)
    (losses * torch.linspace(0.1, 1, losses.shape[1])).sum().backward()
    return [losses]


def outputs(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    found = sg.outputs(model, inputs, **options)
    found.square().sum().backward()
    return [found]


def evaluate(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    del options["schedule"]
    result = sg.evaluate(model, inputs, targets, loss_fn=with_metrics, **options)
    return [result.loss, result.num_targets, result.metrics["wrong"], *values(result.final_state)]


def segment(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    one = sg.Segment(model, inputs, targets, loss_fn=with_metrics, **options)
    final = one.forward()
    result = one.reverse()
    return [result.loss, result.num_targets, result.metrics["wrong"], *values(final)]


WAYS = {way.__name__: way for way in (backward, loss, token_loss, outputs, evaluate, segment)}


def gradients(model: nn.Module) -> list[Tensor | None]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def require_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y


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

FORWARD = [("x", 0, 16), ("x", 16, 32), ("x", 32, 40)]
AHEAD = [("x", 0, 17), ("x", 16, 33), ("x", 32, 40)]  # with the token that follows


def pairs(spans: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return [(name, *span) for _, *span in spans for name in ("x", "y")]


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
    log: list[tuple[str, int, int]] = []
    options = {"chunk": CHUNK, "schedule": sg.Rebuild()}
    WAYS[way](build(LinearAttention), Reading(TOKENS, "x", log), None, **options)
    assert log == next_tokens
    log.clear()
    WAYS[way](build(LinearAttention), Reading(TOKENS, "x", log), Reading(TARGETS, "y", log), **options)
    assert log == with_targets


def test_a_number_to_divide_by_saves_the_read_that_counts() -> None:
    log: list[tuple[str, int, int]] = []
    result = sg.backward(
        build(LinearAttention), Reading(TOKENS, "x", log), Reading(TARGETS, "y", log), chunk=CHUNK, normalizer=1
    )
    assert log == pairs(FORWARD[:2]) + pairs(FORWARD[::-1])
    assert result.num_targets == int((TARGETS != -100).sum())


def test_a_list_counts_before_the_first_reverse_sweep() -> None:
    """The gradient of the first document's loss needs the number of all targets: one read of them, not of inputs."""
    log: list[tuple[str, int, int]] = []
    inputs, targets = ([Reading(x, name, log) for name in names] for x, names in ((TOKENS, "ab"), (TARGETS, "yz")))
    sg.backward(build(LinearAttention), inputs, targets, chunk=CHUNK)
    asked = {name: [span for who, *span in log if who == name] for name in "abyz"}
    back = [[32, 40], [16, 32], [0, 16]]
    assert asked["a"] == asked["b"] == [[0, 16], [16, 32], *back]
    assert asked["y"] == [[0, 16], [16, 32], [32, 40], *back]
    assert asked["z"] == [*back[::-1], [0, 16], [16, 32], *back]


def test_a_schedule_asks_again_for_what_it_advances_again() -> None:
    log: list[tuple[str, int, int]] = []
    sg.backward(build(LinearAttention), Reading(TOKENS, "x", log), chunk=CHUNK, schedule=sg.Binomial(1))
    assert log == [*FORWARD[:2], AHEAD[2], FORWARD[0], AHEAD[1], AHEAD[0]]


def test_nothing_is_asked_for_before_the_first_chunk() -> None:
    reader = Reading(TOKENS)
    one = sg.Segment(build(LinearAttention), reader, chunk=CHUNK)
    assert reader.log == []
    one.forward()
    assert reader.log == [("", 0, 16), ("", 16, 32), ("", 32, 40)]


# --- the same numbers each time ---


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


# --- errors, and going on ---


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
    log: list[tuple[str, int, int]] = []
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


def test_a_reader_of_no_tensors_is_refused_in_the_sweep() -> None:
    class Numbers(Reading):
        def read(self, start: int, stop: int) -> Any:
            return super().read(start, stop).numpy()

    model = build(AllKinds)
    with pytest.raises(sg.InputError, match=r"inputs: read\(0, 16\): expected a tensor .* got a ndarray"):
        sg.backward(model, Numbers(TOKENS), chunk=CHUNK)
