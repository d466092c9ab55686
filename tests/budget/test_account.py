"""The account of a plan is what its run takes: never less, and not much more. Tensors that are alive are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.budget import choose, planning, probe
from slimgrad.models import Cached, Gated, Performer, PerformerConfig, Windowed
from tests.budget.planned import HELD, PLENTY, alive, fix_what_is_held, measured, most_alive, request, run
from tests.toy_models import LinearAttention

MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # with its symbols, and the length of a sequence
    "performer": (lambda: Performer(PerformerConfig(layers=2, width=64, heads=2)), 256, 530),
    "gated": (lambda: Gated(32), 256, 521),
    "windowed": (lambda: Windowed(32, window=32), 256, 523),
    "cached": (lambda: Cached(32), 256, 531),
    "cached in a window": (lambda: Cached(32, window=50), 256, 541),
    "linear attention": (lambda: LinearAttention(width=12), 13, 547),
}


@cache
def build(name: str) -> tuple[nn.Module, Tensor]:
    """The same each time, so that it is measured once."""
    torch.manual_seed(0)
    make, symbols, time = MODELS[name]
    return make(), torch.randint(symbols, (1, time))


@pytest.fixture(autouse=True)
def _held(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_what_is_held(monkeypatch)


def budgets(asked: planning.Request) -> list[int]:
    """Hardly enough, enough, plenty."""
    chooser = measured(asked)
    least, most = chooser.smallest().num_bytes, chooser.best(PLENTY).num_bytes
    return [least + 500_000, (2 * least + most) // 3, PLENTY - HELD]


def check(asked: planning.Request, plan: sg.Plan, way: str = "backward") -> None:
    """What is alive in the run of a plan is at most what it says, and at least 85 % of that."""
    expected = alive(plan.account)
    found = most_alive(lambda: run(way, asked.model, asked.inputs, plan=plan))
    assert 0.85 * expected <= found <= expected, (found, plan)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_alive_is_what_was_predicted(name: str) -> None:
    model, tokens = build(name)
    asked = request(model, tokens)
    chunks = set()
    for more in budgets(asked):
        plan = planning.make_plan(asked, HELD + more)
        assert plan.peak <= plan.memory
        check(asked, plan)
        chunks.add(plan.chunk)
    assert len(chunks) > 1


SCHEDULES = {"no tape": sg.Rebuild(), "tape": sg.Rebuild(tape=3), "few states": sg.Binomial(2), "all states": sg.Keep()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["performer", "windowed", "cached"])
def test_of_any_way(name: str, schedule: str) -> None:
    """Chunks of 128 tokens, whose costs are among the first that are measured."""
    model, tokens = build(name)
    asked = request(model, tokens)
    way = measured(asked).way(128, SCHEDULES[schedule])
    check(asked, sg.Plan(chunk=128, schedule=way.schedule, memory=PLENTY, account=way.account))


@pytest.mark.parametrize(
    ("name", "way"),
    [("windowed", "loss"), ("cached", "token_loss"), ("windowed", "outputs"), ("cached", "evaluate")],
)
def test_of_whoever_owns_the_loss(name: str, way: str) -> None:
    model, tokens = build(name)
    asked = request(model, tokens, way=way)
    check(asked, planning.make_plan(asked, HELD + budgets(asked)[1]), way)


@pytest.mark.parametrize(("name", "way"), [("linear attention", "loss"), ("cached", "backward")])
def test_of_several_sequences(name: str, way: str) -> None:
    """Of which all states are held at once, or all results. What is said may be more: documents differ in length."""
    model, tokens = build(name)
    asked = request(model, [tokens[:, :300], tokens[:, :90], tokens], way=way)
    found = measured(asked).way(64, sg.Rebuild())
    plan = sg.Plan(chunk=64, schedule=found.schedule, memory=PLENTY, account=found.account)
    assert most_alive(lambda: run(way, model, asked.inputs, plan=plan)) <= alive(plan.account)


def test_of_a_given_state_with_rows() -> None:
    model, tokens = build("cached")
    with torch.no_grad():
        _, state = model(tokens[:, :200], model.initial_state(1))
    asked = request(model, tokens, state=state)
    chooser = measured(asked)
    assert chooser.costs.given == 200
    way = chooser.way(64, sg.Rebuild())
    plan = sg.Plan(chunk=64, schedule=way.schedule, memory=PLENTY, account=way.account)
    found = most_alive(lambda: sg.backward(model, tokens, state=state, plan=plan))
    assert 0.85 * alive(plan.account) <= found <= alive(plan.account)


def test_how_far_a_window_reaches_is_seen() -> None:
    assert measured(request(*build("cached in a window"))).costs.reach == 49
    assert measured(request(*build("cached"))).costs.reach is None


def test_what_never_changes_is_kept_once() -> None:
    """The projection of random features is in the state, and is no copy per chunk."""
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=1, width=32, heads=2, feature_map="favor"))
    assert measured(request(model, torch.randint(256, (1, 400)))).costs.plain == 0


# --- mistakes that must be seen ---


def without(term: str) -> Callable[..., choose.Way]:
    """The account, with a term left out."""
    original = choose.Chooser.way

    def way(self: choose.Chooser, chunk: int, schedule: sg.Schedule) -> choose.Way:
        found = original(self, chunk, schedule)
        return dataclasses.replace(found, account=found.account | {term: 0})

    return way


@pytest.mark.parametrize(
    ("term", "name", "schedule"),
    [
        ("tape", "performer", "tape"), ("gradients", "performer", "no tape"),
        ("state and adjoint", "performer", "no tape"), ("kept states", "windowed", "all states"),
        ("rows", "cached", "no tape"), ("one chunk", "cached", "no tape"),
    ],
)  # fmt: skip
def test_a_term_that_is_left_out_is_seen(term: str, name: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose.Chooser, "way", without(term))
    with pytest.raises(AssertionError):
        test_of_any_way(name, schedule)


def test_gradients_of_rows_that_are_left_out_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = probe.Prober._look_at_kept

    def look(self: probe.Prober, started: Any) -> None:
        original(self, started)
        self.costs.row_grads = 0.0

    monkeypatch.setattr(probe.Prober, "_look_at_kept", look)
    build.cache_clear()
    with pytest.raises(AssertionError):
        test_of_any_way("cached", "no tape")


def test_an_adjoint_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is looked at in the first sweep alone, where there is none."""

    def is_held(self: probe.Prober, started: Any, span: Any) -> bool:
        return started.run.progress.phase == "forward"

    monkeypatch.setattr(probe.Prober, "_is_held", is_held)
    build.cache_clear()
    with pytest.raises(AssertionError):
        test_of_any_way("windowed", "few states")


def test_what_the_chunk_before_left_is_not_counted_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that would begin where the one before ended seems smaller by what that had not let go of yet."""
    original = probe.Prober._is_held
    kept: list[Any] = []

    def is_held(self: probe.Prober, started: Any, span: Any) -> bool:
        kept.append(torch.zeros(100_000))  # as if something of each chunk stayed alive until now
        return original(self, started, span)

    monkeypatch.setattr(probe.Prober, "_is_held", is_held)
    build.cache_clear()
    with pytest.raises(AssertionError):
        test_of_any_way("performer", "no tape")
