"""A tape: chunks whose graphs live from the first sweep to the second, and what may happen to them in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimgrad as sg
from slimgrad.errors import InputError, ModelError, SweepError
from slimgrad.states.sums import SumCarrier
from slimgrad.states.tensors import TensorCarrier
from slimgrad.sweep.schedules.names import parse_schedule
from tests.contract import contract
from tests.contract.cases import CASES, next_token
from tests.states.own_kinds import Decayed
from tests.sweep.refusing import Refuse
from tests.sweep.test_splitting import EVEN, MODELS, WAYS, collect, require_same, sequence
from tests.toy_models import AllKinds, CachedAttention, LinearAttention

TAPED = [sg.Rebuild(tape=2), sg.Rebuild(tape=9), sg.Every(2, tape=2), sg.Binomial(1, tape=1)]


class Checkpointed(nn.Module):
    """Another model, of which every chunk is run again in its backward pass."""

    def __init__(self, model: nn.Module, *, reads_value: bool = False) -> None:
        super().__init__()
        self.model, self.reads_value = model, reads_value

    def initial_state(self, batch_size: int) -> Any:
        return self.model.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Any) -> Any:
        return checkpoint(self._inner, inputs, state, use_reentrant=False)

    def _inner(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = self.model(inputs, state)
        return (outputs + following["sums"].value.tanh().sum() if self.reads_value else outputs), following


@pytest.mark.parametrize("schedule", TAPED, ids=str)
@pytest.mark.parametrize("kind", [LinearAttention, CachedAttention, AllKinds])
def test_activation_checkpointing_inside(kind: type[nn.Module], schedule: sg.Schedule) -> None:
    contract.check(next_token(lambda: Checkpointed(kind())), chunk=16, schedule=schedule)


@pytest.mark.parametrize("schedule", TAPED, ids=str)
def test_the_value_of_a_sum_is_the_chunks_own(schedule: sg.Schedule) -> None:
    """It is read again in the backward pass, when the sum itself has moved on."""
    model = Checkpointed(LinearAttention(), reads_value=True).double()
    tokens = torch.randint(13, (2, 100))

    def gradients(schedule: sg.Schedule) -> dict[str, Tensor]:
        sg.backward(model, tokens, chunk=16, schedule=schedule)
        return collect(model)

    expected = gradients(sg.Keep())
    found = gradients(schedule)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_the_value_of_a_sum_that_has_moved_on_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SumCarrier, "of_chunk", tuple(x for x in SumCarrier.of_chunk if x != "_after"))
    with pytest.raises(ModelError, match="read in the backward pass"):
        test_the_value_of_a_sum_is_the_chunks_own(TAPED[0])


@pytest.mark.parametrize("schedule", TAPED, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_bits_are_those_without_a_tape(kind: type[nn.Module], way: str, schedule: sg.Schedule) -> None:
    found: list[dict[str, Tensor]] = []
    for one in (sg.Keep(), schedule):
        torch.manual_seed(3)
        (inputs, targets), model = sequence(kind, 100), kind()
        inputs = inputs if isinstance(inputs, Tensor) else {k: x.detach().float() for k, x in inputs.items()}
        value = WAYS[way](model, inputs, targets, chunk=16, schedule=one)
        found.append({"value": value} | collect(model))
    expected, taped = found
    assert all(torch.equal(taped[name], x) for name, x in expected.items())


def test_chunks_on_the_tape_run_once() -> None:
    runs: list[int] = []

    class Counted(LinearAttention):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            runs.append(inputs.shape[1])
            return super().forward(inputs, state)

        def advance(self, inputs: Tensor, state: Any) -> Any:
            runs.append(-inputs.shape[1])
            return super().advance(inputs, state)

    tokens = torch.randint(13, (1, 8 * 16))
    sg.backward(Counted(), tokens, chunk=16, schedule=sg.Rebuild(tape=3))
    assert runs == [-16] * 5 + [16] * 3 + [16] * 5
    runs.clear()
    sg.backward(Counted(), tokens, chunk=16, schedule=sg.Rebuild(tape=8))
    assert runs == [16] * 8


# --- memory that is refused ---


@pytest.mark.parametrize("schedule", TAPED, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_tape_that_does_not_fit(
    kind: type[nn.Module], schedule: sg.Schedule, refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    """Its chunks are then scheduled like all others, and not cut: without their graphs they fit."""
    refuser = refuse("tape")
    events = require_same(kind, "backward", refuser, time=EVEN, schedule=schedule)
    assert refuser.times == 1
    assert max(event.stop - event.start for event in events) == 64
    assert "going on without a tape" in caplog.text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("schedule", TAPED, ids=str)
def test_the_backward_pass_of_a_taped_chunk_does_not_fit(way: str, schedule: sg.Schedule, refuse: Refuse) -> None:
    refuser = refuse("begins")
    require_same(AllKinds, way, refuser, time=EVEN, schedule=schedule)
    assert refuser.times > 1  # with the tape, and without it: then in parts


def test_memory_that_is_short_before_the_tape(refuse: Refuse) -> None:
    events = require_same(AllKinds, "backward", refuse("forward"), schedule=sg.Rebuild(tape=1))
    assert max(event.stop - event.start for event in events) == 32


# --- saved on the way ---


@pytest.mark.parametrize("schedule", [sg.Rebuild(tape=4), sg.Rebuild(tape=99), sg.Every(2, tape=3)], ids=str)
@pytest.mark.parametrize("kind", [LinearAttention, AllKinds])
def test_saved_after_every_chunk(kind: type[nn.Module], schedule: sg.Schedule, tmp_path: Path) -> None:
    """The graphs are not saved; the chunks are run again, to the same bits."""
    tokens = torch.randint(13, (2, 100))

    def model() -> nn.Module:
        torch.manual_seed(1)
        return kind().float()

    torch.manual_seed(2)
    whole = model()
    segment = sg.Segment(whole, tokens, chunk=16, schedule=schedule)
    segment.on_chunk = lambda event: segment.save(tmp_path / f"{event.phase} {event.start}")
    segment.forward()
    segment.reverse()
    expected = collect(whole)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) >= 12
    for folder in folders:
        if folder.name == "reverse 0":
            continue
        other = model()
        again = sg.Segment.load(folder, other, tokens)
        again.forward()
        again.reverse()
        found = collect(other)
        assert all(torch.equal(found[name], x) for name, x in expected.items()), folder.name


# --- mistakes ---


def test_a_tape_that_is_not_put_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that stay where the tape ended are refused by their bits."""
    load = SumCarrier.load
    monkeypatch.setattr(SumCarrier, "load", lambda self, store, token, position: setattr(self, "position", position))
    with pytest.raises(sg.SlimgradError):
        contract.check(dict(CASES)["linear attention"], chunk=16, schedule=sg.Rebuild(tape=3))
    monkeypatch.setattr(SumCarrier, "load", load)


def test_a_state_with_the_graph_of_the_chunk_before_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A taped chunk begins from a leaf, or the adjoint is counted twice."""
    monkeypatch.setattr(TensorCarrier, "sources", lambda self: [])
    with pytest.raises((AssertionError, sg.SlimgradError)):
        contract.check(dict(CASES)["gated"], chunk=16, schedule=sg.Rebuild(tape=3))


@pytest.mark.parametrize("tape", [-1, True, 1.5, "all"])
def test_what_is_no_number_of_chunks(tape: Any) -> None:
    with pytest.raises(InputError, match="expected a whole number of chunks"):
        sg.Rebuild(tape=tape)


def test_a_kind_of_state_that_does_not_say_what_belongs_to_a_chunk() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def initial_state(self, batch_size: int) -> Decayed:
            return Decayed(torch.zeros(batch_size), 0.5)

        def forward(self, inputs: Tensor, state: Decayed) -> Any:
            before, state = state.move(inputs.sum(1) * self.weight, inputs.shape[1])
            return (before[:, None] + inputs)[..., None], state

    with pytest.raises(SweepError, match=r"cannot be put on a tape.*tape=0"):
        sg.outputs(Model(), torch.ones(1, 64), chunk=16, schedule=sg.Keep(tape=1))


def test_by_name() -> None:
    assert parse_schedule("rebuild+tape:8") == sg.Rebuild(tape=8)
    assert parse_schedule("every:4+tape:2@disk") == sg.Every(4, tape=2, store="disk")
    for text in ("rebuild+tape", "rebuild+tape:x", "rebuild+8", "+tape:2", "auto+tape:1"):
        with pytest.raises(InputError):
            parse_schedule(text)
