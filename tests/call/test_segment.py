"""`Segment`: the gradient of `backward`, bit for bit, in two calls that anyone may come between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.call.segments import (
    CHUNK,
    MODELS,
    TARGETS,
    TOKENS,
    Biased,
    bits,
    built,
    counted,
    different,
    finished,
    segment,
)
from tests.contract.contract import collect, cotangent_for, fresh_state, plain, worst_error
from tests.toy_models import Signals

SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(3), sg.Binomial(2)]
EXACT = 1e-12  # measured over all tests here: at most 6e-16
CUT, COUNT = 21, int((TARGETS != -100).sum())


def backward(model: nn.Module, *args: Any, **options: Any) -> sg.Result:
    torch.manual_seed(5)
    return sg.backward(model, TOKENS, *args, chunk=CHUNK, **options)


class Numbers:
    """A reader of a tensor."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.spans = tokens, list[tuple[int, int]]()
        self.batch, self.length = tokens.shape

    def read(self, start: int, stop: int) -> Tensor:
        self.spans.append((start, stop))
        return self.tokens[:, start:stop]


def context() -> dict[str, Any]:
    return {"bias": torch.linspace(-1, 1, 13, dtype=torch.float64).requires_grad_(), "scale": 2}


# --- the same gradient ---


@pytest.mark.parametrize("stopped", [0, 2, 9])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_without_the_final_state_it_runs_what_backward_runs(
    schedule: sg.Schedule, stopped: int, tmp_path: Path
) -> None:
    """Whether or not it is saved on the way, and loaded."""
    model, spans = built("a mix"), list[tuple[str, int]]()
    result = backward(model, schedule=schedule, on_chunk=lambda event: spans.append((event.phase, event.start)))
    expected = bits(model, result)
    one = segment(model := built("a mix"), schedule=schedule, final_state=False)
    found = list[tuple[str, int]]()

    def hear(event: sg.Event) -> None:
        found.append((event.phase, event.start))
        if len(found) == stopped:
            one.save(tmp_path)
            raise KeyboardInterrupt

    one.on_chunk = hear
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            finished(one)
        one = sg.Segment.load(tmp_path, model, TOKENS, on_chunk=hear)
    assert one.forward() is None
    assert different(bits(model, one.reverse()), expected) == []
    assert found == spans


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_backward_bit_for_bit(kind: str, schedule: sg.Schedule) -> None:
    expected, got = built(kind), built(kind)
    whole = backward(expected, TARGETS, schedule=schedule, loss_fn=counted)
    result = finished(segment(got, TARGETS, schedule=schedule, loss_fn=counted))
    assert different(bits(got, result), bits(expected, whole)) == []
    assert result.schedule == schedule
    assert "missed" in result.metrics


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("chunk", [1, 8])
def test_any_length(length: int, chunk: int) -> None:
    expected, got = built("a mix"), built("a mix")
    tokens, targets = TOKENS[:, :length], TOKENS[:, 1 : length + 1]
    torch.manual_seed(5)
    whole = sg.backward(expected, tokens, targets, chunk=chunk)
    torch.manual_seed(5)
    result = finished(sg.Segment(got, tokens, targets, chunk=chunk))
    assert different(bits(got, result), bits(expected, whole)) == []


@pytest.mark.parametrize("scale", [None, 0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)])
def test_the_cotangent_of_the_loss(scale: Any) -> None:
    expected, got = built("a mix"), built("a mix")
    whole = backward(expected, normalizer="targets" if scale is None else 4)
    result = finished(segment(got), scale)
    assert different(bits(got, result), bits(expected, whole)) == []


def test_gradients_add_to_those_that_are_there() -> None:
    model = built("sums")
    finished(segment(model))
    once = [p.grad.clone() for p in model.parameters()]
    finished(segment(model))
    assert all(torch.equal(p.grad, g + g) for p, g in zip(model.parameters(), once, strict=True))


def test_readers_and_how_many_targets_they_have() -> None:
    """Counted on the way, or read for whoever asks before: once."""
    expected = built("sums")
    whole = finished(segment(expected, TARGETS))
    for asks_early in (False, True):
        model, targets = built("sums"), Numbers(TARGETS)
        one = sg.Segment(model, Numbers(TOKENS), targets, chunk=CHUNK)
        if asks_early:
            assert one.num_targets == COUNT
            assert targets.spans[-1] == (40, 41)
        one.forward()
        assert one.num_targets == COUNT
        assert different(bits(model, one.reverse()), bits(expected, whole)) == []


# --- what goes in and comes out at both ends ---


@pytest.mark.parametrize("kind", ["sums", "rows", "gates", "a mix", "complex"])
def test_two_segments_are_one_sequence(kind: str) -> None:
    """The second goes first on the way back; its initial state's gradient is the first's final one."""
    model = built(kind).eval()  # without draws: the parts have seeds of their own
    backward(model, TARGETS)
    expected = collect(model, None, None)
    first = sg.Segment(model, TOKENS[:, :CUT], TARGETS[:, :CUT], chunk=CHUNK)
    second = sg.Segment(model, TOKENS[:, CUT:], TARGETS[:, CUT:], chunk=CHUNK, state=first.forward())
    second.forward()
    back = second.reverse(1 / COUNT)
    first.reverse(1 / COUNT, back.initial_state_grad)
    error, name = worst_error(collect(model, None, None), expected)
    assert error < EXACT, name


@pytest.mark.parametrize("kind", ["sums", "rows", "gates", "a mix"])
def test_a_given_state_takes_its_gradient(kind: str) -> None:
    """Into its own leaves, against plain backpropagation, with a random gradient of the final state."""
    model = built(kind).eval()
    _, given = model(TOKENS[:, :9], model.initial_state(2))
    _, final = model(TOKENS, fresh_state(given))
    gradient = cotangent_for(final)
    _, expected = plain(model, TOKENS, TARGETS, state=fresh_state(given), final_gradient=gradient)
    state = fresh_state(given)
    result = finished(segment(model, TARGETS, state=state), None, gradient)
    got = collect(model, None, result.initial_state_grad)
    error, name = worst_error(got, expected)
    assert error < EXACT, name
    leaves = [x.value if isinstance(x, sg.State) else x for x in torch.utils._pytree.tree_leaves(state)]
    taken = [x.grad for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    of_state = [g for name, g in got.items() if name.startswith("state")]
    assert len(taken) == len(of_state)
    assert all(torch.equal(a, b) for a, b in zip(taken, of_state, strict=True))


def test_the_gradient_goes_on_through_whatever_made_the_state() -> None:
    model, encoder = built("gates").eval(), nn.Linear(3, 6, dtype=torch.float64)
    features = torch.randn(2, 3, dtype=torch.float64)
    found = []
    for sweep in (lambda s: finished(segment(model, state=s)), lambda s: backward(model, state=s)):
        sweep({"h": encoder(features), "position": torch.zeros((), dtype=torch.int64)})
        found.append(encoder.weight.grad.clone())
        encoder.zero_grad()
    assert torch.equal(*found)
    assert bool((found[0] != 0).any())


def test_inputs_and_context_take_gradients() -> None:
    torch.manual_seed(3)
    signals, x = Signals().double(), torch.randn(2, 41, 3, dtype=torch.float64)
    grads = []
    for sweep in (sg.backward, lambda *args, **options: finished(sg.Segment(*args, **options))):
        inputs = {"left": x.clone().requires_grad_(), "right": x.cos()}
        result = sweep(signals, inputs, TARGETS % 5, chunk=CHUNK)
        assert torch.equal(inputs["left"].grad, result.input_grads["left"])
        assert result.input_grads["right"] is None
        biased, given = Biased().double(), context()
        biased.load_state_dict(built("sums").state_dict())
        sweep(biased, TOKENS, chunk=CHUNK, context=given)
        grads.append([inputs["left"].grad, given["bias"].grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(bool((g != 0).any()) for g in grads[0])


def test_a_sink_takes_each_chunks_gradient() -> None:
    expected, model, taken = built("sums"), built("sums"), list[Tensor]()
    finished(segment(expected))
    finished(segment(model, sink={"head.weight": taken.append}))
    assert len(taken) == 5
    assert model.head.weight.grad is None
    error = (sum(taken) - expected.head.weight.grad).norm() / expected.head.weight.grad.norm()
    assert float(error) < EXACT


# --- how far it has come ---


def test_it_goes_once_through_every_phase() -> None:
    events: list[sg.Event] = []
    model = built("sums")
    one = segment(model, on_chunk=events.append)
    assert one.phase == "new"
    with pytest.raises(sg.ConsumedError, match="'new', expected 'swept'"):
        one.reverse()
    final = one.forward()
    assert one.phase == "swept"
    assert one.forward() is final  # asked again, it says it again
    assert [(e.phase, e.start, e.stop) for e in events] == [("forward", s, e) for s, e in SPANS]
    assert all(p.grad is None for p in model.parameters())
    result = one.reverse()
    assert one.phase == "closed"
    # a sum goes back: no chunk runs more than twice
    assert [(e.phase, e.start, e.stop) for e in events[5:]] == [("reverse", s, e) for s, e in reversed(SPANS)]
    assert torch.equal(result.final_state["sums"].value, final["sums"].value)
    for call in (one.forward, one.reverse, lambda: one.save("never written")):
        with pytest.raises(sg.ConsumedError):
            call()


SPANS = [(0, 8), (8, 16), (16, 24), (24, 32), (32, 41)]


def test_phases_in_the_middle_of_a_sweep() -> None:
    one, seen = segment(built("sums")), list[str]()
    one.on_chunk = lambda _: seen.append(one.phase)
    finished(one)
    assert seen == ["forward"] * 5 + ["reverse"] * 5


def test_an_interrupt_leaves_the_gradients_as_they_were() -> None:
    model = built("gates")
    finished(segment(model))
    before = [p.grad.clone() for p in model.parameters()]
    one = segment(model)
    one.forward()

    def interrupt(event: sg.Event) -> None:
        if event.start == 16:
            raise KeyboardInterrupt

    one.on_chunk = interrupt
    with pytest.raises(KeyboardInterrupt):
        one.reverse()
    assert one.phase == "closed"
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


# --- refused ---


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        ({"sums": torch.zeros(2, 4, 5)}, "another structure than the state"),
        ({"sums": 0.0, "position": None}, r"state \['sums'\]: expected a tensor or None, got float"),
        ({"sums": torch.zeros(4, 5), "position": None}, r"expected the final state's shape \[2, 4, 5\], got \[4, 5\]"),
    ],
    ids=["a leaf too few", "a number", "another shape"],
)
def test_a_wrong_gradient_of_the_final_state_costs_nothing(gradient: Any, message: str) -> None:
    """It is refused before the reverse sweep begins, and the right one may follow."""
    expected, model = built("sums"), built("sums")
    one = segment(model)
    one.forward()
    with pytest.raises(sg.SweepError, match=message):
        one.reverse(None, gradient)
    assert one.phase == "swept"
    assert different(bits(model, one.reverse()), bits(expected, finished(segment(expected)))) == []


def test_a_list_of_sequences_is_refused() -> None:
    with pytest.raises(sg.InputError, match="one sequence, got a list; make one Segment for each"):
        sg.Segment(built("sums"), [TOKENS])


def test_nothing_to_differentiate_is_refused() -> None:
    with pytest.raises(sg.InputError, match="nothing requires a gradient"):
        segment(built("sums").requires_grad_(False))


def test_inside_of_another_sweep_it_is_refused() -> None:
    model, inner = built("sums"), built("sums")
    handle = model.head.register_forward_pre_hook(lambda *_: segment(inner) and None)
    with pytest.raises(sg.SweepError, match="inside a chunk of another"):
        finished(segment(model))
    handle.remove()


def test_a_weight_that_changes_between_the_sweeps_is_noticed() -> None:
    model = built("gates").eval()
    one = segment(model)
    one.forward()
    with torch.no_grad():
        model.value.weight[0, 0] += 1e-9
    with pytest.raises(sg.ConsumedError, match="modified between the loss and its backward"):
        one.reverse()


def test_a_weight_that_no_state_depends_on_is_noticed_too() -> None:
    model = built("gates").eval()
    one = segment(model)
    one.forward()
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-9
    with pytest.raises(sg.ConsumedError, match="modified between the loss and its backward"):
        one.reverse()


def test_the_mode_is_that_of_the_first_sweep() -> None:
    model, other = built("gates").eval(), built("gates").eval()
    one = segment(model)
    one.forward()
    model.train()
    one.reverse()
    assert model.training
    finished(segment(other))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_targets_that_change_between_the_sweeps_are_noticed() -> None:
    targets = TARGETS.clone()
    one = segment(built("sums"), targets)
    one.forward()
    targets[1, 3] = 2
    with pytest.raises(sg.ConsumedError, match="targets, tokens 0 to 7: other values were read"):
        one.reverse()


def test_a_budget_and_its_plan_after_a_load(tmp_path: Path) -> None:
    """The plan goes with what is saved, and the gradient goes on with its chunk."""
    tokens = torch.randint(13, (1, 700))
    expected = sg.backward(built("sums"), tokens, memory="4GiB")
    model, loaded = built("sums"), built("sums")
    torch.manual_seed(5)
    segment = sg.Segment(model, tokens, memory="4GiB")
    segment.forward()
    segment.save(tmp_path)
    again = sg.Segment.load(tmp_path, loaded, tokens)
    results = [segment.reverse(), again.reverse()]
    assert results[0].plan is not None
    assert results[0].plan == results[1].plan
    assert results[0].schedule == results[1].schedule == results[0].plan.schedule
    assert float(results[1].loss) == float(results[0].loss) == pytest.approx(float(expected.loss), rel=1e-12)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
