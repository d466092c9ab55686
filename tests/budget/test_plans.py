"""A budget in place of a chunk: the same gradient, nothing touched on the way, and the choice. See test_account too."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import slimgrad as sg
from slimgrad.budget import available, planning
from slimgrad.budget.choose import Chooser, Slack, Work
from slimgrad.budget.fit import SHRUNK, Fit, Point, Small
from slimgrad.budget.probe import Costs
from tests.budget.planned import HELD, PLENTY, fix_what_is_held, gradients, request, run
from tests.contract import contract
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

WAYS = ("backward", "loss", "token_loss", "outputs", "Chunked", "evaluate")


@pytest.fixture(autouse=True)
def _held(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_what_is_held(monkeypatch)


# --- the gradient ---


@pytest.mark.parametrize("kind", [LinearAttention, GatedRecurrence, CachedAttention, AllKinds])
@pytest.mark.parametrize("more", [20 << 20, 200 << 20])
def test_the_gradient_is_plain_backpropagations(kind: type[nn.Module], more: int) -> None:
    torch.manual_seed(0)
    model, tokens = kind().double().eval(), torch.randint(13, (2, 260))
    expected = contract.plain(model, tokens, None)
    result = sg.backward(model, tokens, memory=HELD + more)
    found = contract.collect(model, tokens, result.initial_state_grad)
    contract.require_close((result.loss, found), expected)
    assert result.plan is not None
    assert result.plan.peak <= HELD + more


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_bit_for_bit_what_its_plan_says(way: str) -> None:
    torch.manual_seed(0)
    model, tokens = AllKinds(), torch.randint(13, (2, 700))
    memory = HELD + (40 << 20)
    found = run(way, model, tokens, memory=memory), gradients(model)
    plan = planning.make_plan(request(model, tokens, way="loss" if way == "Chunked" else way), memory)
    how: dict[str, Any] = {} if way == "evaluate" else {"schedule": plan.schedule}
    expected = run(way, model, tokens, chunk=plan.chunk, **how), gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(_list(found[0]), _list(expected[0]), strict=True))
    assert all(torch.equal(found[1][name], x) for name, x in expected[1].items())


def _list(x: Any) -> list[torch.Tensor]:
    return x if isinstance(x, list) else [x]


# --- what is refused ---


def test_a_budget_that_is_too_small_names_the_smallest_that_is_not() -> None:
    model, tokens = AllKinds(), torch.randint(13, (2, 1200))
    with pytest.raises(sg.InputError, match=r"memory of 1\.0 MB: expected [\d.]+ MB at least.*for: ") as raised:
        sg.backward(model, tokens, memory="1MB")
    assert all(p.grad is None for p in model.parameters())
    least = float(str(raised.value).split("expected ")[1].split(" MB")[0])
    assert sg.backward(model, tokens, memory=int(least * 1e6 * 1.01)).plan is not None


@pytest.mark.parametrize("memory", ["lots", "", 0, -1, True, 1.5])
def test_what_is_no_amount(memory: Any) -> None:
    with pytest.raises(sg.InputError, match="amount"):
        sg.backward(AllKinds(), torch.randint(13, (2, 50)), memory=memory)


def test_one_dial() -> None:
    model, tokens = AllKinds(), torch.randint(13, (2, 500))
    plan = sg.plan(model, tokens, memory=PLENTY)
    for how in ({"chunk": 8, "memory": PLENTY}, {"chunk": 8, "plan": plan}, {"memory": PLENTY, "plan": plan}):
        with pytest.raises(sg.InputError, match="expected one of them"):
            sg.backward(model, tokens, **how)
    with pytest.raises(sg.InputError, match="beside plan="):
        sg.backward(model, tokens, plan=plan, schedule=sg.Every(3))


def test_neither_dial() -> None:
    model = LinearAttention()
    assert sg.backward(model, torch.randint(13, (1, 4096))).plan is None
    assert sg.backward(model, torch.randint(13, (1, 4097))).plan is not None


# --- a value ---


def test_a_plan_is_a_value() -> None:
    model, tokens = AllKinds(), torch.randint(13, (2, 500))
    plan = sg.plan(model, tokens, memory=PLENTY)
    again = sg.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    for same in (again, copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert same == plan
        assert sg.backward(model, tokens, plan=same).plan == plan
    assert plan.peak == sum(plan.account.values())
    assert "allocator" in str(plan)
    with pytest.raises(sg.InputError, match="expected a plan"):
        sg.Plan.from_dict({"chunk": 3})


# --- nothing is touched ---


class Counting(nn.Module):
    """Another model; counts its calls, draws, and has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = GatedRecurrence(dropout=0.1), [0]
        self.register_buffer("noise", torch.arange(3.0))

    def initial_state(self, batch_size: int) -> Any:
        return self.inner.initial_state(batch_size)

    def forward(self, inputs: Any, state: Any) -> Any:
        self.calls[0] += 1
        return self.inner(inputs, state)


def test_planning_leaves_everything_as_it_was() -> None:
    model, tokens, heard, sunk = Counting(), torch.randint(13, (2, 600)), list[sg.Event](), list[Any]()
    model.inner.head.weight.grad = given = torch.ones_like(model.inner.head.weight)
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    plan = sg.plan(model, tokens, memory=PLENTY, sink={"inner.head.bias": sunk.append})
    assert plan.chunk > 1
    assert not heard
    assert not sunk
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.noise, torch.arange(3.0))
    assert modes == [m.training for m in model.modules()]
    assert model.inner.head.weight.grad is given
    assert torch.equal(given, torch.ones_like(given))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "inner.head.weight")


def test_a_model_is_measured_once_and_forgotten_with_it() -> None:
    model, tokens = Counting(), torch.randint(13, (2, 600))
    first = sg.plan(model, tokens, memory=PLENTY)
    calls = model.calls[0]
    assert sg.plan(model, tokens, memory=PLENTY) is first
    sg.plan(model, tokens[:, :590], memory=PLENTY)
    assert model.calls[0] <= calls + 40  # but for a size that was not measured
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_plan_is_made_anew_when_the_process_holds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = LinearAttention(), torch.randint(13, (1, 20_000))
    memory = HELD + (60 << 20)
    first = sg.plan(model, tokens, memory=memory)
    fix_what_is_held(monkeypatch, HELD + memory - first.peak + (4 << 20))
    second = sg.plan(model, tokens, memory=memory)
    assert second is not first
    assert second.peak <= memory


# --- malloc ---


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As in a command, whose plans set malloc; what they would have set."""
    done = list[str]()

    def set_malloc(name: str) -> bool:
        done.append(name)
        available._malloc.name = name  # pyright: ignore[reportPrivateUsage]
        return True

    monkeypatch.setattr(available, "_malloc", type(available._malloc)())  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(available, "set_malloc", set_malloc)
    available.let_plans_set_malloc()
    return done


def test_a_command_keeps_what_is_freed_where_that_is_faster_and_fits(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First touches of what is called large here are made slow; keeping it takes more memory."""
    monkeypatch.setattr(planning, "fault_seconds", lambda: 1e-6)
    monkeypatch.setattr(available, "RETURNED", dataclasses.replace(available.RETURNED, threshold=1000))
    monkeypatch.setattr(available, "KEPT", dataclasses.replace(available.KEPT, fixed=64 << 20))
    model, tokens = LinearAttention(), torch.randint(13, (1, 20_000))
    much = sg.plan(model, tokens, memory=PLENTY)
    assert (much.malloc, done) == ("kept", ["returned", "kept"])  # to begin with, for what is measured; then as chosen
    little = sg.plan(model, tokens, memory=HELD + (40 << 20))
    assert (little.malloc, done[-1]) == ("returned", "returned")
    sg.backward(model, tokens, plan=much)
    assert done[-1] == "kept"
    count = len(done)
    assert sg.plan(model, tokens, memory=PLENTY) is much  # what was chosen before is set again
    assert done[count:] == ["kept"]


def test_a_library_does_not_set_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(available, "set_malloc")
    model, tokens = LinearAttention(), torch.randint(13, (1, 600))
    plan = sg.plan(model, tokens, memory=PLENTY)
    assert plan.malloc == "default"
    sg.backward(model, tokens, plan=dataclasses.replace(plan, malloc="kept"))


# --- the choice ---


def costs(tape: float = 0.8) -> Costs:
    """A chunk takes 1,000 bytes a token, and a second for a million; a pass forward a third of that."""
    sizes = (64, 256, 1024)

    def line(a: float, b: float, *, seconds: bool = False) -> Fit:
        return Fit([Point(size, 0, a + b * size) for size in sizes], grows=False, seconds=seconds)

    names = {"forward": 0.5, "reverse": 1.0, "kept": 0.9}
    found = Costs(bytes={name: line(0, 1000 * share) for name, share in names.items()} | {"held": line(5000, 0)})
    found.small = {name: Small([line(0, 0)] * len(SHRUNK)) for name in names}
    shares = {"forward": 0.33, "reverse": 1.0, "tape": tape}
    found.seconds = {name: line(1e-4, 1e-6 * share, seconds=True) for name, share in shares.items()}
    return found


def test_more_memory_is_never_slower() -> None:
    chooser, least = Chooser(costs(), Work([100_000]), Slack("", 0, 0.0, 0.1, 1000)), None
    for num_bytes in range(100_000, 200_000_000, 9_777_777):
        way = chooser.best(num_bytes)
        assert way is not None
        assert way.num_bytes <= num_bytes
        assert least is None or way.seconds <= 1.03 * least
        least = way.seconds if least is None else min(least, way.seconds)
    assert way.schedule.tape  # what is spare buys time


def test_a_tape_that_costs_more_than_it_saves_is_left_out() -> None:
    for fault_seconds, wanted in ((0.0, True), (1e-8, False)):
        work = Work([100_000], fault_seconds=fault_seconds)
        way = Chooser(costs(), work, Slack("", 0, 0.0, 0.1, 1000)).best(60_000_000)
        assert way is not None
        assert (way.schedule.tape > 1) is wanted


def test_states_that_do_not_fit_are_kept_in_slots() -> None:
    found = costs()
    found.plain = 1_000_000
    way = Chooser(found, Work([1_000_000]), Slack("", 0, 0.0, 0.1, 1000)).best(40_000_000)
    assert way is not None
    assert isinstance(way.schedule, sg.Binomial | sg.Rebuild)
    assert way.num_bytes <= 40_000_000
    named = Chooser(found, Work([1_000_000], schedule=sg.Every(40)), Slack("", 0, 0.0, 0.1, 1000)).best(10**9)
    assert named is not None
    assert isinstance(named.schedule, sg.Every)


@pytest.mark.parametrize("grows", [False, True])
def test_a_fit_meets_its_points_and_what_lies_between_them(grows: bool) -> None:
    def truth(chunk: int, before: float) -> float:
        return 300 + 70 * chunk + 0.02 * chunk * chunk + (3 * before + 0.5 * chunk * before if grows else 0)

    places = [(size, size * n) for size in (64, 128, 256) for n in range(4)]
    fit = Fit([Point(*place, truth(*place)) for place in places], grows=grows)
    for place in [*places, (100, 100), (1000, 3000), (4096, 0)]:
        assert fit(*place) == pytest.approx(truth(*place), rel=0.02)
        assert place not in places or fit(*place) >= truth(*place) * (1 - 1e-9)
