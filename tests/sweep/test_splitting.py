"""Chunks that do not fit into memory: wherever an allocation fails, the gradient comes out, or `.grad` is as it was."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.call.losses import cross_entropy_sum, token_cross_entropy
from slimgrad.sweep.random import draw_seed
from tests.sweep.refusing import Refuse, Refused, Refuser, build, its_own, sequence
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention, Signals

MODELS = [LinearAttention, GatedRecurrence, CachedAttention, AllKinds, Signals]
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)]
CHUNK, TIME, EVEN = 64, 205, 192  # chunks of 64, and at the end of 13, or of 64 as well
TOLERANCE = 1e-12  # float64, each gradient by itself: measured at most 3e-15


def backward(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Tensor:
    return sg.backward(model, inputs, targets, **options).loss


def loss(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Tensor:
    found = sg.loss(model, inputs, targets, **options)
    found.backward()
    return found.detach()


def token_loss(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Tensor:
    losses = sg.token_loss(model, inputs, targets, **options)
    (losses * torch.linspace(0.1, 1, losses.shape[1], dtype=losses.dtype)).sum().backward()
    return losses.detach()


def outputs(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Tensor:
    found = sg.outputs(model, inputs, **options)
    (found.square() * torch.linspace(0.1, 1, found.shape[1], dtype=found.dtype)[:, None]).sum().backward()
    return found.detach()


WAYS = {way.__name__: way for way in (backward, loss, token_loss, outputs)}


def collect(model: nn.Module, inputs: Any = None) -> dict[str, Tensor]:
    """Every gradient by name, taken off the model and the inputs."""
    named = [(name.removeprefix("model."), p) for name, p in model.named_parameters()]
    named += [(f"input {i}", x) for i, x in enumerate(pytree.tree_leaves(inputs)) if x is not None]
    found = {name: x.grad for name, x in named if x.grad is not None}
    for _, x in named:
        x.grad = None
    return found


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert float((found[name] - x).norm()) <= TOLERANCE * float(x.norm()), name


def require_same(kind: type[nn.Module], way: str, refuser: Refuser, time: int = TIME, **options: Any) -> list[sg.Event]:
    """With the refuser as without: loss, losses or outputs, and every gradient. Returns what was told on the way."""
    options = {"chunk": CHUNK} | options
    (inputs, targets), model = sequence(kind, time), build(kind)
    expected = {"value": WAYS[way](model, inputs, targets, **options)} | collect(model, inputs)
    model, events = Refused(model, refuser), list[sg.Event]()
    if refuser.place == "loss":
        head = token_cross_entropy if way == "token_loss" else cross_entropy_sum

        def refusing(outputs: Tensor, targets: Tensor) -> Tensor:
            refuser.at("loss", outputs.shape[1])
            return head(outputs, targets)

        options["loss_fn"] = refusing
    found = {"value": WAYS[way](model, inputs, targets, on_chunk=events.append, **options)}
    require_close(found | collect(model, inputs), expected)
    back = [event for event in events if event.phase == "reverse"]
    assert (back[0].stop, back[-1].start) == (time, 0)
    assert all(earlier.start == later.stop for earlier, later in itertools.pairwise(back))
    return events


def longest(events: list[sg.Event], phase: str) -> int:
    return max(event.stop - event.start for event in events if event.phase == phase)


# --- the gradient ---


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", ["forward", "reverse", "loss", "begins"])
def test_a_chunk_is_taken_in_parts(
    kind: type[nn.Module], schedule: sg.Schedule, place: str, refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    """One attempt fails, and what comes after it is cut as finely at once. The run says so."""
    refuser = refuse(place)
    events = require_same(kind, "backward", refuser, schedule=schedule)
    assert refuser.times == 1
    assert longest(events, "reverse") == 32
    assert longest(events, "forward") == (32 if place == "forward" else 64)
    first = (0, 63) if place == "forward" else (128, 191)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "tokens {} to {} did not fit into memory (MemoryError: pretended): taken in parts from here on".format(
                *first
            ),
        )
    ]


@pytest.mark.parametrize("schedule", [sg.Every(2), sg.Every(3), sg.Binomial(1), sg.Binomial(2, store="disk")], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_chunk_that_is_advanced_again_is_taken_in_parts(
    kind: type[nn.Module], way: str, schedule: sg.Schedule, refuse: Refuse
) -> None:
    refuser = refuse("again")
    events = require_same(kind, way, refuser, 5 * CHUNK + 13, schedule=schedule)
    assert refuser.times == 1
    assert longest(events, "forward") == 64
    assert longest(events, "again") == 32


@pytest.mark.parametrize("kind", [LinearAttention, CachedAttention])
def test_the_chunk_of_a_plan_is_halved_where_memory_is_short_all_the_same(
    kind: type[nn.Module], refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    """From there on, and not for good: the plan is as it was."""
    (inputs, targets), model = sequence(kind, TIME), build(kind)
    plan = sg.Plan(chunk=CHUNK, schedule=sg.Rebuild(tape=1), memory=1 << 30)
    expected = {"value": backward(model, inputs, targets, plan=plan)} | collect(model)
    model, events = Refused(model, refuse("forward")), list[sg.Event]()
    result = sg.backward(model, inputs, targets, plan=plan, on_chunk=events.append)
    require_close({"value": result.loss} | collect(model), expected)
    assert (longest(events, "forward"), longest(events, "reverse")) == (CHUNK // 2, CHUNK // 2)
    assert result.plan is plan
    assert "taken in parts from here on" in caplog.text


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Every(2)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("way", "place"),
    [case for case in itertools.product(["loss", "token_loss", "outputs"], ["forward", "reverse", "loss", "begins"])
     if case != ("outputs", "loss")],
)  # fmt: skip
def test_whoever_owns_the_loss(
    kind: type[nn.Module], way: str, schedule: sg.Schedule, place: str, refuse: Refuse
) -> None:
    refuser = refuse(place)
    events = require_same(kind, way, refuser, schedule=schedule)
    # twice more where a loss of as many tokens is asked whether it adds up
    assert refuser.times == (3 if way == place == "loss" else 1)
    assert longest(events, "reverse") == 32
    # the first sweep runs the head, so a loss that is too large is found there
    assert longest(events, "forward") == (64 if place in ("reverse", "begins") else 32)


@pytest.mark.parametrize("chunk", [67, 100, 1000])
@pytest.mark.parametrize("limit", [16, 17, 21, 31, 50])
@pytest.mark.parametrize("place", ["forward", "reverse"])
@pytest.mark.parametrize("kind", [LinearAttention, AllKinds])
def test_lengths_that_split_unevenly_down_to_the_floor(
    kind: type[nn.Module], place: str, limit: int, chunk: int, refuse: Refuse
) -> None:
    """What has less than 32 tokens is not taken apart: with a limit of 31 the gradient always comes out."""
    refuser = refuse(place, limit)
    try:
        events = require_same(kind, "loss", refuser, chunk=chunk)
    except sg.MemoryLimitError as error:
        tokens = re.match(r"tokens (\d+) to (\d+) did not fit .*, and cannot be taken in smaller parts", str(error))
        assert tokens is not None
        assert limit < int(tokens[2]) - int(tokens[1]) + 1 < 32
    else:
        assert longest(events, "reverse") <= limit
    assert refuser.times >= 1


@pytest.mark.parametrize("place", ["forward", "reverse", "halfway"])
@pytest.mark.parametrize("kind", [LinearAttention, GatedRecurrence, CachedAttention])
def test_a_gradient_of_the_final_state_enters_once(kind: type[nn.Module], place: str, refuse: Refuse) -> None:
    """And the states at both ends are those of the unsplit sweep, with their gradients."""
    (inputs, _), model = sequence(kind, EVEN), build(kind)

    def floating(leaf: Any) -> Tensor | None:
        x = getattr(leaf, "value", leaf)
        return x if x is not None and x.is_floating_point() else None

    def values(state: Any, name: str) -> dict[str, Tensor]:
        leaves = map(floating, pytree.tree_leaves(state))
        return {f"{name} {i}": x for i, x in enumerate(leaves) if x is not None}

    final = pytree.tree_map(floating, sg.evaluate(model, inputs, chunk=CHUNK).final_state)
    given = pytree.tree_map(lambda x: None if x is None else x.cos(), final)

    def run(model: nn.Module) -> dict[str, Tensor]:
        result = sg.backward(model, inputs, chunk=CHUNK, final_state_grad=given)
        ends = values(result.final_state, "final") | values(result.initial_state_grad, "gradient")
        return collect(model) | ends

    expected = run(model)
    refuser = refuse(place)
    require_close(run(Refused(model, refuser)), expected)
    assert refuser.times == 1


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Binomial(2)], ids=str)
@pytest.mark.parametrize("kind", [LinearAttention, AllKinds])
@pytest.mark.parametrize("place", ["forward", "reverse", "begins"])
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_a_list_of_documents(
    kind: type[nn.Module], way: str, place: str, schedule: sg.Schedule, refuse: Refuse
) -> None:
    """Each is split by itself: those that follow are not cut finer for it."""
    documents = [sequence(kind, time)[0] for time in (30, 150, 64, 99)]
    model, events = build(kind), list[sg.Event]()
    expected = {"value": WAYS[way](model, documents, None, chunk=CHUNK, schedule=schedule)} | collect(model)
    refuser = refuse(place)
    model = Refused(model, refuser)
    value = WAYS[way](model, documents, None, chunk=CHUNK, schedule=schedule, on_chunk=events.append)
    require_close({"value": value} | collect(model), expected)
    # `backward` reverses the only chunk of the third straight away
    assert refuser.times == (2 if (way, place) == ("backward", "forward") else 3)
    for time, most in ((30, 30), (150, 32), (64, 32 if refuser.times == 3 else 64), (99, 35)):
        back = [event for event in events if event.phase == "reverse" and event.length == time]
        assert (back[0].stop, back[-1].start) == (time, 0)
        assert longest(back, "reverse") == most


@pytest.mark.parametrize("kind", [LinearAttention, AllKinds])
def test_without_a_gradient(kind: type[nn.Module], refuse: Refuse) -> None:
    (inputs, _), model = sequence(kind, TIME), build(kind)
    expected = sg.evaluate(model, inputs, chunk=CHUNK)
    with torch.no_grad():
        along = sg.outputs(model, inputs, chunk=CHUNK)
        refuser = refuse("forward")
        require_close({"": sg.outputs(Refused(model, refuser), inputs, chunk=CHUNK)}, {"": along})
    assert refuser.times == 1
    refuser = refuse("forward")
    found = sg.evaluate(Refused(model, refuser), inputs, chunk=CHUNK)
    require_close({"": found.loss}, {"": expected.loss})
    assert found.num_targets == expected.num_targets
    assert refuser.times == 1
    with pytest.raises(sg.MemoryLimitError, match=r"^tokens 0 to \d\d did not fit .* cannot be taken in smaller parts"):
        sg.evaluate(Refused(model, refuse("forward", 5)), inputs, chunk=CHUNK)


# --- in the middle of a backward pass ---


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_half_of_the_gradients_of_the_chunk_that_is_reversed_first(
    kind: type[nn.Module], way: str, schedule: sg.Schedule, refuse: Refuse
) -> None:
    """They are dropped, and the adjoint of the last chunk begins again."""
    refuser = refuse("halfway")
    events = require_same(kind, way, refuser, EVEN, schedule=schedule)
    assert refuser.times == 1
    assert longest(events, "reverse") == 32


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", ["backward", "loss", "outputs"])
def test_half_of_the_gradients_of_another_chunk_cannot_be_told_back(
    kind: type[nn.Module], way: str, schedule: sg.Schedule, refuse: Refuse
) -> None:
    """Every .grad is as it was, and the model its own; it may go on with smaller chunks."""
    (inputs, targets), plain = sequence(kind, TIME), build(kind)
    expected = WAYS[way](plain, inputs, targets, chunk=32, schedule=schedule)
    expected = {"value": expected} | collect(plain, inputs)
    model = Refused(plain, refuse("halfway"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads, before = [p.grad for p in model.parameters()], its_own(model)
    message = (
        r"^tokens 128 to 191 did not fit into memory \(MemoryError: pretended\), in the backward pass, when a part of "
        r"the gradients had been added.* Every \.grad is as it was .* Use a smaller chunk=, or save a slimgrad.Segment"
    )
    torch.manual_seed(1)
    draw_seed()  # all that a call draws from the global generator
    drawn = torch.random.get_rng_state()
    torch.manual_seed(1)
    with pytest.raises(sg.MemoryLimitError, match=message):
        WAYS[way](model, inputs, targets, chunk=CHUNK, schedule=schedule)
    assert its_own(model) == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), grads, strict=True))
    collect(model, inputs)
    value = WAYS[way](model, inputs, targets, chunk=32, schedule=schedule)
    require_close({"value": value} | collect(model, inputs), expected)


@pytest.mark.parametrize(("kind", "recovers"), [(GatedRecurrence, True), (CachedAttention, False)])
def test_what_is_added_to_an_adjoint_in_place_cannot_be_told_back(
    kind: type[nn.Module], recovers: bool, refuse: Refuse
) -> None:
    """No parameter has anything of the chunk yet. Rows have one gradient buffer, to which it has been added."""
    (inputs, _), model = sequence(kind, TIME), build(kind)
    model.requires_grad_(False).embed.requires_grad_()
    sg.backward(model, inputs, chunk=CHUNK)
    expected = collect(model)
    model = Refused(model, refuse("halfway"))
    if recovers:
        sg.backward(model, inputs, chunk=CHUNK)
        require_close(collect(model), expected)
    else:
        with pytest.raises(sg.MemoryLimitError, match="in the backward pass"):
            sg.backward(model, inputs, chunk=CHUNK)


def test_what_a_sink_took_cannot_be_told_back(refuse: Refuse) -> None:
    (inputs, _), model, taken = sequence(AllKinds, EVEN), build(AllKinds), []
    model = Refused(model, refuse("halfway"))
    with pytest.raises(sg.MemoryLimitError, match="in the backward pass"):
        sg.backward(model, inputs, chunk=CHUNK, sink={"model.head.weight": taken.append})
    assert len(taken) == 1
    assert collect(model) == {}


def test_gradients_that_gather_in_wider_buffers_are_dropped_as_well(refuse: Refuse) -> None:
    """bfloat16: what the parts add up to is off by its rounding, measured 3e-3; a chunk added twice, by 0.3."""
    (inputs, _), model = sequence(LinearAttention, EVEN), build(LinearAttention).bfloat16()
    sg.backward(model, inputs, chunk=32)
    expected = torch.cat([g.flatten() for g in collect(model).values()])
    model = Refused(model, refuse("halfway"))
    sg.backward(model, inputs, chunk=CHUNK)
    found = torch.cat([g.flatten() for g in collect(model).values()])
    assert float((found - expected).norm() / expected.norm()) < 0.02


class WithContext(GatedRecurrence):
    def forward(self, inputs: Tensor, state: Any, context: Tensor) -> Any:
        outputs, following = super().forward(inputs, state)
        return outputs * context, following


@pytest.mark.parametrize("place", ["begins", "halfway"])
def test_gradients_of_a_context_are_dropped_as_well(place: str, refuse: Refuse) -> None:
    (inputs, _), model = sequence(GatedRecurrence, EVEN), build(WithContext)
    context = torch.linspace(1, 2, 13, dtype=torch.float64).requires_grad_()
    sg.backward(model, inputs, chunk=CHUNK, context=context)
    expected = collect(model, [context])
    refuser = refuse(place)
    model = Refused(model, refuser)
    sg.backward(model, inputs, chunk=CHUNK, context=context)
    require_close(collect(model, [context]), expected)
    assert refuser.times == 1


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Every(2)], ids=str)
@pytest.mark.parametrize("kind", [GatedRecurrence, CachedAttention, AllKinds, LinearAttention])
@pytest.mark.parametrize("saves", [3, 5], ids=["saved in the first sweep", "saved in the reverse sweep"])
def test_a_saved_segment_goes_on_by_itself(
    kind: type[nn.Module],
    schedule: sg.Schedule,
    saves: int,
    refuse: Refuse,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Told back to the file, where the gradients of the other chunks are."""
    (inputs, _), model = sequence(kind, TIME), build(kind)
    sg.backward(model, inputs, chunk=CHUNK, schedule=schedule)
    expected = collect(model)
    refuser, heard = refuse("halfway"), itertools.count(1)
    model = Refused(model, refuser)
    segment = sg.Segment(model, inputs, chunk=CHUNK, schedule=schedule)
    segment.on_chunk = lambda event: segment.save(tmp_path) if next(heard) == saves else None
    segment.forward()
    segment.reverse()
    require_close(collect(model), expected)
    assert refuser.times == 1
    assert len([said for said in caplog.messages if said.startswith(f"going on from {tmp_path}, in ")]) == 1
