"""Kinds of state are open: two that are defined beside this file, and nowhere known, go through all that there is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from tests.contract.contract import Gradients, collect, plain_loss, worst_error
from tests.states.own_kinds import Both, Decayed, Turned, built

TOKENS = torch.arange(2 * 67).reshape(2, 67) * 7 % 13
TARGETS = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
COUNT = int((TARGETS != -100).sum())
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(3), sg.Binomial(2, store="disk")]
EXACT = 1e-12  # measured over all tests here: at most 6e-16


def gradients(model: nn.Module) -> Gradients:
    return collect(model, None, None)


def truth() -> Gradients:
    """Plain backpropagation through one call."""
    model = built()
    outputs, _ = model(TOKENS, model.initial_state(2))
    plain_loss(outputs, TARGETS).backward()
    return gradients(model)


def require_close(got: Gradients, expected: Gradients) -> None:
    error, name = worst_error(got, expected)
    assert error < EXACT, name


# --- exact, by every way in ---


@pytest.mark.parametrize("schedule", [None, *SCHEDULES], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("chunk", [1, 8, 66, 67, 99])
def test_backward(chunk: int, schedule: sg.Schedule | None) -> None:
    model = built()
    sg.backward(model, TOKENS, chunk=chunk, schedule=schedule)
    require_close(gradients(model), truth())


def test_every_other_way_in() -> None:
    ways: list[Callable[[nn.Module], Tensor]] = [
        lambda model: sg.loss(model, TOKENS, chunk=8),
        lambda model: sg.token_loss(model, TOKENS, chunk=8).sum() / COUNT,
        lambda model: plain_loss(sg.outputs(model, TOKENS, chunk=8), TARGETS),
        lambda model: sg.Chunked(model, chunk=8)(TOKENS),
    ]
    for way in ways:
        model = built()
        way(model).backward()
        require_close(gradients(model), truth())


def test_draws_are_repeated() -> None:
    """Under any schedule the same, though chunks are run again from states that were kept or turned back."""
    found = []
    for schedule in SCHEDULES:
        model = built(dropout=0.2)
        torch.manual_seed(5)
        sg.backward(model, TOKENS, chunk=8, schedule=schedule)
        found.append(gradients(model))
    for other in found[1:]:
        require_close(other, found[0])


def test_evaluate_and_verify() -> None:
    model = built()
    with torch.no_grad():
        _, final = model(TOKENS, model.initial_state(2))
    found = sg.evaluate(model, TOKENS, chunk=8).final_state
    assert isinstance(found["decayed"], Decayed)
    assert found["decayed"].rate == 0.97
    torch.testing.assert_close(found["decayed"].value, final["decayed"].value, rtol=1e-14, atol=0)
    assert torch.equal(found["turned"][0].value, final["turned"][0].value)
    report = sg.verify(model, TOKENS, chunk=8)
    assert report.passed, str(report)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_carried_from_part_to_part(schedule: sg.Schedule) -> None:
    """The second part begins with the state of the first, and gives its gradient back; both take part in autograd."""
    model = built()
    first = sg.Segment(model, TOKENS[:, :30], TARGETS[:, :30], chunk=8, schedule=schedule)
    second = sg.Segment(model, TOKENS[:, 30:], TARGETS[:, 30:], chunk=8, schedule=schedule, state=first.forward())
    second.forward()
    back = second.reverse(1 / COUNT)
    assert back.initial_state_grad["turned"][0].shape == (2, 5)
    first.reverse(1 / COUNT, back.initial_state_grad)
    require_close(gradients(model), truth())


def test_a_ring_that_goes_back_is_not_kept() -> None:
    """Rebuild keeps the sum that forgets once a chunk, and no ring; Keep keeps both."""
    held = {}
    for schedule in (sg.Rebuild(), sg.Keep()):
        events: list[sg.Event] = []
        sg.backward(built(), TOKENS, chunk=8, schedule=schedule, on_chunk=events.append)
        held[type(schedule)] = max(event.held_bytes for event in events)
    row = 128  # 2 x 5 doubles, to whole 64 bytes
    assert held[sg.Keep] - held[sg.Rebuild] >= 7 * row  # the ring in as many slots as there are chunks but one
    assert held[sg.Rebuild] >= 7 * row


# --- saved, sent, split ---


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_saved_at_every_step(schedule: sg.Schedule, tmp_path: Path) -> None:
    folders: list[Path] = []

    def save(_: object = None) -> None:
        folders.append(tmp_path / str(len(folders)))
        one.save(folders[-1])

    model = built(dropout=0.2)
    one = sg.Segment(model, TOKENS, chunk=8, schedule=schedule, on_chunk=save)
    save()
    one.forward()
    save()
    final = one.reverse().final_state
    expected = gradients(model)
    for folder in folders:
        model = built(dropout=0.2)
        again = sg.Segment.load(folder, model, TOKENS)
        again.forward()
        result = again.reverse()
        found = gradients(model)
        assert [name for name, g in expected.items() if not torch.equal(g, found[name])] == []
        assert isinstance(result.final_state["decayed"], Decayed)
        assert torch.equal(result.final_state["decayed"].value, final["decayed"].value)


def test_sent_with_all_that_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind's own form, by way of `with_value` and pickle: the rate arrives too."""
    line: list[bytes] = []

    def send_objects(objects: list[Any], **_: Any) -> None:
        line.append(pickle.dumps(objects))

    def receive_objects(objects: list[Any], **_: Any) -> None:
        objects[:] = pickle.loads(line.pop(0))

    def send(x: Tensor, **_: Any) -> None:
        line.append(bytes(x.tolist()))

    def receive(x: Tensor, **_: Any) -> None:
        x.copy_(torch.tensor(list(line.pop(0)), dtype=torch.uint8))

    for name, function in {
        "send_object_list": send_objects, "recv_object_list": receive_objects, "send": send, "recv": receive
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.distributed, name, function)
    state = {"decayed": Decayed(torch.randn(2, 5), 0.9), "turned": [Turned(torch.randn(3).double())]}
    assert sg.send_state(state, to=1) == 2 * 5 * 4 + 3 * 8
    got = sg.receive_state(source=0)
    assert (type(got["decayed"]), got["decayed"].rate) == (Decayed, 0.9)
    assert torch.equal(got["decayed"].value, state["decayed"].value)
    assert torch.equal(got["turned"][0].value, state["turned"][0].value)
    assert line == []


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("phase", ["first sweep", "second sweep"])
def test_chunks_that_do_not_fit_are_taken_in_parts(phase: str, schedule: sg.Schedule) -> None:
    tokens, limit = TOKENS.repeat(1, 3), 200
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)

    class Limited(Both):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            found = super().forward(inputs, state)
            keeps_a_graph = torch._C._autograd._top_saved_tensors_default_hooks(False) is None
            if inputs.shape[1] > limit and keeps_a_graph == (phase == "second sweep"):
                raise MemoryError("too many tokens")
            return found

    def on_chunk(event: sg.Event) -> None:
        nonlocal limit
        events.append(event)
        limit = 20 if event.phase == "forward" or phase == "second sweep" else 200  # from the second chunk on

    model, expected, events = built(), built(), list[sg.Event]()
    model.__class__ = Limited
    outputs, _ = expected(tokens, expected.initial_state(2))
    plain_loss(outputs, targets).backward()
    sg.backward(model, tokens, chunk=64, schedule=schedule, on_chunk=on_chunk)
    lengths = [event.stop - event.start for event in events if event.phase == "reverse"]
    assert min(lengths) <= 20
    assert sum(lengths) == 201
    require_close(gradients(model), gradients(expected))


# --- refused ---


def test_another_leaf_in_its_place_is_refused() -> None:
    class Forgets(Both):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            outputs, following = super().forward(inputs, state)
            return outputs, following | {"decayed": following["decayed"].value}

    with pytest.raises(sg.ModelError, match=r"state \['decayed'\]: expected the object that"):
        sg.backward(Forgets(), TOKENS, chunk=8)


def test_a_ring_that_turns_otherwise_on_the_way_back_is_noticed() -> None:
    class Restless(Both):
        calls = 0

        def forward(self, inputs: Tensor, state: Any) -> Any:
            self.calls += 1
            before, turned = state["turned"][0].turn(self.calls)
            outputs, following = super().forward(inputs, state | {"turned": [Turned(before)]})
            return outputs, following | {"turned": [turned]}

    with pytest.raises(sg.SlimgradError, match=r"calls|state \['turned'\]\[0\].* other bits"):
        sg.backward(Restless(), TOKENS, chunk=8)


def test_a_counter_in_the_model_is_no_crime() -> None:
    """Attributes that change make the first chunk run twice; what comes of it is compared by value."""

    class Counting(Both):
        calls = 0

        def forward(self, inputs: Tensor, state: Any) -> Any:
            self.calls += 1
            return super().forward(inputs, state)

    model = built()
    model.__class__ = Counting
    sg.backward(model, TOKENS, chunk=8)
    require_close(gradients(model), truth())
