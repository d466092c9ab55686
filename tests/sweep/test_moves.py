"""A plan, carried out on positions instead of tensors: whole, failing anywhere, entered anywhere, looked ahead in.

`Machine` is the sweep without a model. It has two leaves, one that can go back (a sum) and one that cannot (a plain
tensor), and asserts of every move that both stand where it finds what it needs. Bits are a flag: whether a state has
come through the very spans of the first sweep, as all states must that are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgrad import Binomial, Every, Keep, Rebuild, Schedule
from slimgrad.sweep.cut import Cut, Span
from slimgrad.sweep.moves import FLOOR, Move, Moves
from slimgrad.sweep.schedules.base import Kind

schedules = st.one_of(
    st.just(Rebuild()), st.just(Keep()), st.builds(Every, st.integers(1, 6)), st.builds(Binomial, st.integers(1, 4))
)
taped_schedules = st.builds(dataclasses.replace, schedules, tape=st.integers(1, 12))
cuts = st.builds(Cut, st.integers(1, 330), st.integers(1, 140)).filter(lambda cut: len(cut) <= 25)
failures = st.sets(st.integers(0, 120), max_size=8)  # the attempts that fail, by number


class Leaf(NamedTuple):
    """Where a leaf of the state stands, and whether its bits are those of the first sweep."""

    position: int
    exact: bool = True


class Machine:
    """Carries out moves, asserting of each that it finds what it needs."""

    def __init__(self, plan: Moves) -> None:
        self.plan = plan
        self.rolls_back = plan.schedule is not None and plan.schedule.rolls_back
        self.sum = self.tensor = Leaf(0)
        self.slots: dict[int, tuple[Leaf | None, Leaf]] = {}
        self.most_slots = 0
        self.first: list[Span] = []  # the spans that the first sweep went through, and those reversed without it
        self.reversed: list[Span] = []
        self.taped: list[Span] = []  # whose graphs are kept
        self.moves: list[Move] = []

    def do(self, move: Move) -> None:
        self.moves.append(move)
        getattr(self, move.kind.name.lower())(move)

    def fail(self, move: Move) -> None:
        """A chunk that is reversed from the state after it may have rolled back before it failed. No graph is kept."""
        self.taped.clear()
        if self.sum.position == move.span.stop:
            self.sum = Leaf(move.span.start, self.sum.exact)

    def store(self, move: Move) -> None:
        assert self.sum.position == self.tensor.position == move.span.start
        kept = None if self.rolls_back and not move.finer else self.sum
        if move.slot in self.slots:  # a part of a part, which begins where that one does
            assert move.slot < -1
            assert self.slots[move.slot][1] == self.tensor
        self.slots[move.slot] = kept, self.tensor
        self.most_slots = max(self.most_slots, len(self.slots))

    def load(self, move: Move) -> None:
        kept, self.tensor = self.slots[move.slot]
        self.sum = kept or self.sum
        assert self.tensor.position == move.span.start

    def free(self, move: Move) -> None:
        gone = self.slots.pop(move.slot, None)
        assert gone or move.slot < -1  # the first of a part's own parts was freed in its place

    def advance(self, move: Move) -> None:
        assert self.sum.position == self.tensor.position == move.span.start
        self.sum = self.tensor = Leaf(move.span.stop, self.bits(move, self.sum.exact and self.tensor.exact))

    def tape(self, move: Move) -> None:
        self.advance(move)
        self.taped.append(move.span)

    def retrace(self, move: Move) -> None:
        assert move.span in self.first
        self.find(move)
        self.sum = Leaf(move.span.start, self.sum.exact)

    def reverse(self, move: Move) -> None:
        assert move.span.stop == (self.reversed[-1].start if self.reversed else self.plan.cut.length)
        self.reversed.append(move.span)
        if self.taped:  # from its graph: the state may stand anywhere
            assert self.taped.pop() == move.span
            self.sum = self.tensor = Leaf(-1)
            return
        self.find(move)
        self.bits(move, self.tensor.exact)
        self.sum = Leaf(move.span.start, self.sum.exact)

    def find(self, move: Move) -> None:
        """The tensor stands before the chunk; the sum there too, or after it where the schedule rolls back."""
        assert self.tensor.position == move.span.start
        if self.sum.position != move.span.start:
            assert self.rolls_back
            assert self.sum.position == move.span.stop
            assert not move.finer

    def bits(self, move: Move, exact: bool) -> bool:
        """Whether a chunk's bits are those of the first sweep; where they are compared, they must be."""
        if move.finer:  # part of one that went forward whole
            assert any(one.start <= move.span.start and move.span.stop <= one.stop for one in self.first)
            return False
        assert exact or self.plan.again_in_parts
        if not exact:
            return False
        if not self.first or move.span.start == self.first[-1].stop:
            self.first.append(move.span)
        assert move.span in self.first
        return True

    def require_done(self) -> None:
        covered = sorted(self.reversed)
        assert covered[0].start == 0
        assert covered[-1].stop == self.plan.cut.length
        assert all(left.stop == right.start for left, right in pairwise(covered))
        assert not self.slots
        assert self.sum == self.tensor == Leaf(0)  # the initial state, whose gradient is handed out


def carry_out(machine: Machine, failing: Iterable[int] = (), attempt: int = 0) -> int:
    """To the end; the attempts in `failing` fail, if the move can be taken in parts. Returns how many failed."""
    plan, failed, failing = machine.plan, 0, set(failing)
    while (move := plan.next()) is not None:
        assert attempt < 4000, "no end"
        if attempt in failing and move.kind in (Kind.ADVANCE, Kind.TAPE, Kind.REVERSE) and plan.split():
            machine.fail(move)
            failed += 1
        else:
            machine.do(move)
            plan.done()
        attempt += 1
    return failed


def whole_steps(schedule: Schedule, cut: Cut) -> list[Move]:
    return [Move(action.kind, cut[action.chunk], action.slot) for action in schedule.actions(len(cut))]


# --- whole ---


@given(schedules, cuts)
def test_without_an_end_it_is_the_schedule_over_spans(schedule: Schedule, cut: Cut) -> None:
    machine = Machine(Moves(cut, schedule, to_end=False))
    carry_out(machine)
    assert machine.moves == whole_steps(schedule, cut)
    machine.require_done()


@given(schedules, cuts)
def test_the_end_is_part_of_it(schedule: Schedule, cut: Cut) -> None:
    """The last chunk is advanced once, from a state that is kept for it, and nothing else changes."""
    machine = Machine(Moves(cut, schedule, to_end=True))
    carry_out(machine)
    machine.require_done()
    last, slot = cut[len(cut) - 1], schedule.num_slots(len(cut))
    at = next(number for number, move in enumerate(machine.moves) if move.kind is Kind.REVERSE)
    assert machine.moves[at - 3 : at + 2] == [
        Move(Kind.STORE, last, slot),
        Move(Kind.ADVANCE, last),
        Move(Kind.LOAD, last, slot),
        Move(Kind.REVERSE, last),
        Move(Kind.FREE, last, slot),
    ]
    without = [*machine.moves[: at - 3], machine.moves[at], *machine.moves[at + 2 :]]
    assert without == whole_steps(schedule, cut)
    assert machine.most_slots <= slot + 1


@given(cuts)
def test_without_a_schedule_it_only_goes_forward(cut: Cut) -> None:
    machine = Machine(Moves(cut, None, to_end=False))
    carry_out(machine)
    assert machine.moves == [Move(Kind.ADVANCE, cut[number]) for number in range(len(cut))]


@given(schedules, cuts, st.booleans(), failures)
def test_the_first_sweep_ends_with_the_state_that_is_wanted(
    schedule: Schedule, cut: Cut, to_end: bool, failing: set[int]
) -> None:
    plan = Moves(cut, schedule, to_end=to_end)
    machine, attempt = Machine(plan), 0
    while plan.is_forward:
        move = plan.next()
        if attempt in failing and move.kind is Kind.ADVANCE and plan.split():
            machine.fail(move)
        else:
            machine.do(move)
            plan.done()
        attempt += 1
    assert not machine.reversed
    assert plan.reached == (cut.length if to_end else cut[len(cut) - 1].start)
    assert machine.tensor.position == cut[len(cut) - 1].start or len(machine.first) > len(cut)
    carry_out(machine)
    assert not plan.is_forward
    machine.require_done()


# --- failing ---


@settings(max_examples=600)
@given(schedules, cuts, st.booleans(), failures)
def test_wherever_it_fails_every_token_is_reversed_once(
    schedule: Schedule, cut: Cut, to_end: bool, failing: set[int]
) -> None:
    machine = Machine(Moves(cut, schedule, to_end=to_end))
    carry_out(machine, failing)
    machine.require_done()


@settings(max_examples=200)
@given(schedules, cuts, st.booleans())
def test_whatever_fails_until_nothing_can_be_split(schedule: Schedule, cut: Cut, to_end: bool) -> None:
    """Every attempt fails: the parts end up below twice the floor, and none below the floor but what was so short."""
    machine = Machine(Moves(cut, schedule, to_end=to_end))
    carry_out(machine, range(4000))
    machine.require_done()
    shortest = min(min(stop - start for start, stop in machine.reversed), FLOOR)
    assert max(stop - start for start, stop in machine.reversed) < 2 * FLOOR
    assert shortest == min(FLOOR, cut.chunk, cut[len(cut) - 1].stop - cut[len(cut) - 1].start)


@given(schedules, st.booleans(), st.integers(2, 9))
def test_later_chunks_are_cut_as_finely_at_once(schedule: Schedule, to_end: bool, count: int) -> None:
    """One failure in the first chunk, and no other has to fail: not again where it is advanced again, either."""
    machine = Machine(Moves(Cut(64 * count, 64), schedule, to_end=to_end))
    first = next(number for number, move in enumerate(whole_steps(schedule, machine.plan.cut)) if move.kind == 2)
    assert carry_out(machine, {first}) == 1
    machine.require_done()
    assert {stop - start for start, stop in machine.reversed} == {32}
    assert not any(move.finer for move in machine.moves)


@given(schedules, st.integers(2, 9))
def test_what_went_forward_whole_is_reversed_in_parts_from_before(schedule: Schedule, count: int) -> None:
    plan = Moves(Cut(64 * count, 64), schedule, to_end=True)
    machine = Machine(plan)
    while plan.is_forward:
        machine.do(plan.next())
        plan.done()
    assert carry_out(machine, {0}) == 1
    machine.require_done()
    assert {stop - start for start, stop in machine.reversed} == {32}
    assert all(move.finer for move in machine.moves if move.kind is Kind.REVERSE)
    retraced = [move for move in machine.moves if move.kind is Kind.RETRACE]
    assert len(retraced) == (count if schedule.rolls_back else 0)  # elsewhere the state before is at hand


@pytest.mark.parametrize(("length", "splits"), [(2 * FLOOR, True), (2 * FLOOR - 1, False), (1, False)])
@pytest.mark.parametrize("schedule", [Rebuild(), Keep(), Every(2), Binomial(2), None], ids=str)
def test_the_floor(schedule: Schedule | None, length: int, splits: bool) -> None:
    plan = Moves(Cut(length, length), schedule, to_end=False)
    while plan.next().kind not in (Kind.ADVANCE, Kind.REVERSE):
        plan.done()
    assert plan.split() is splits
    while plan.next().kind not in (Kind.ADVANCE, Kind.REVERSE):
        plan.done()
    assert plan.next().span.stop == (length // 2 if splits else length)


@pytest.mark.parametrize("to_end", [True, False])
@pytest.mark.parametrize("schedule", [Every(3), Binomial(1), Binomial(2)], ids=str)
def test_what_is_advanced_again_is_taken_in_parts_from_then_on(schedule: Schedule, to_end: bool) -> None:
    """One failure; what comes of the parts has other bits, until a state of the first sweep is loaded."""
    machine = Machine(Moves(Cut(64 * 7, 64), schedule, to_end=to_end))
    failures = 0
    while (move := machine.plan.next()) is not None:
        if move.kind is Kind.ADVANCE and move.span.stop <= machine.plan.reached and not move.finer:
            machine.fail(move)
            failures += 1
            assert machine.plan.split()
            continue
        machine.do(move)
        machine.plan.done()
    machine.require_done()
    assert failures == 1


def test_neither_a_retrace_nor_a_move_is_split() -> None:
    plan = Moves(Cut(128, 64), Rebuild(), to_end=False)
    machine = Machine(plan)
    refused = set()
    while (move := plan.next()) is not None:
        if move.kind is Kind.REVERSE and move.span == (0, 64):
            assert plan.split()
            machine.fail(move)
            continue
        if move.kind is Kind.RETRACE:
            assert not plan.split()
            refused.add(move.kind)
        machine.do(move)
        plan.done()
    assert refused == {Kind.RETRACE}
    machine.require_done()


# --- a tape at the end ---


@settings(max_examples=150)
@given(taped_schedules, cuts, st.booleans(), failures)
def test_a_tape_that_fails_anywhere(schedule: Schedule, cut: Cut, to_end: bool, failing: set[int]) -> None:
    machine = Machine(Moves(cut, schedule, to_end=to_end))
    failed = carry_out(machine, failing)
    machine.require_done()
    if not failed:
        on_tape = [move.span for move in machine.moves if move.kind is Kind.TAPE]
        assert on_tape == [*cut][-schedule.tape :]
        assert machine.most_slots <= machine.plan.num_slots
        run = [move for move in machine.moves if move.kind in (Kind.ADVANCE, Kind.TAPE)]
        before = len(cut) - len(on_tape)
        assert len(run) == len(on_tape) + (schedule.num_advances(before) + 1 if before else 0)


@settings(max_examples=60)
@given(taped_schedules, cuts.filter(lambda cut: len(cut) <= 8), st.booleans(), failures)
def test_graphs_are_no_part_of_what_is_saved(schedule: Schedule, cut: Cut, to_end: bool, failing: set[int]) -> None:
    """From wherever it was saved, the chunks of the tape are run again, and everything ends as it should."""
    machine, attempt = Machine(Moves(cut, schedule, to_end=to_end)), 0
    while (move := machine.plan.next()) is not None:
        text = json.dumps(machine.plan.state())
        other = copy.copy(machine)
        other.slots, other.first, other.reversed = dict(machine.slots), [*machine.first], [*machine.reversed]
        other.taped, other.moves, other.plan = [], [], Moves(cut, schedule, to_end=to_end)
        other.plan.load_state(json.loads(text))
        assert json.dumps(other.plan.state()) == text
        carry_out(other)
        other.require_done()
        if attempt in failing and move.kind in (Kind.ADVANCE, Kind.TAPE, Kind.REVERSE) and machine.plan.split():
            machine.fail(move)
        else:
            machine.do(move)
            machine.plan.done()
        attempt += 1
    machine.require_done()


# --- entered in the middle ---


@settings(max_examples=60)
@given(schedules, cuts.filter(lambda cut: len(cut) <= 8), st.booleans(), failures)
def test_a_saved_plan_goes_on_alike(schedule: Schedule, cut: Cut, to_end: bool, failing: set[int]) -> None:
    """Saved before every attempt, as plain values, which later moves leave alone."""
    plan = Moves(cut, schedule, to_end=to_end)
    saved: list[tuple[Any, str]] = []
    moves: list[Move] = []
    while (move := plan.next()) is not None:
        state = plan.state()
        saved.append((state, json.dumps(state)))
        moves.append(move)
        if not (len(moves) - 1 in failing and move.kind in (Kind.ADVANCE, Kind.REVERSE) and plan.split()):
            plan.done()
    for attempt, (state, text) in enumerate(saved):
        assert json.dumps(state) == text
        again = Moves(cut, schedule, to_end=to_end)
        again.load_state(json.loads(text))
        rest: list[Move] = []
        while (move := again.next()) is not None:
            rest.append(move)
            number = attempt + len(rest) - 1
            if not (number in failing and move.kind in (Kind.ADVANCE, Kind.REVERSE) and again.split()):
                again.done()
        assert rest == moves[attempt:]


# --- looked ahead in ---


@settings(max_examples=100)
@given(schedules, cuts, st.booleans(), failures, st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_looking_ahead_changes_nothing(
    schedule: Schedule, cut: Cut, to_end: bool, failing: set[int], counts: list[int]
) -> None:
    looking, other = (Moves(cut, schedule, to_end=to_end) for _ in range(2))
    attempt = 0
    while (move := other.next()) is not None:
        count = counts[attempt % len(counts)]
        assert len(looking.ahead(count)) <= count
        assert looking.next() == move
        ahead = looking.ahead(count + 1)
        assert ahead[0] == move
        if attempt in failing and move.kind in (Kind.ADVANCE, Kind.REVERSE):
            split = other.split()
            assert looking.split() is split
            if split:
                attempt += 1
                continue
        looking.done()
        other.done()
        attempt += 1
    assert looking.next() is None
    assert looking.ahead(3) == []


@given(schedules, cuts, st.booleans(), st.integers(0, 9))
def test_what_is_ahead_comes(schedule: Schedule, cut: Cut, to_end: bool, count: int) -> None:
    plan = Moves(cut, schedule, to_end=to_end)
    promised: list[list[Move]] = []
    moves: list[Move] = []
    while (move := plan.next()) is not None:
        promised.append(plan.ahead(count))
        moves.append(move)
        plan.done()
    assert promised == [moves[number : number + count] for number in range(len(moves))]


# --- of any length ---


@pytest.mark.parametrize("schedule", [Rebuild(), Keep(), Every(316), Binomial(8)], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_a_hundred_thousand_chunks_cost_next_to_nothing(schedule: Schedule, fails: bool) -> None:
    """Measured at every thousandth move: 3 kB, and 16 with Every, which lists its segments. A chunk that is cut finer
    in the first sweep adds its edges for good, 40 bytes each: here one.
    """
    cut = Cut(100_000 * 64, 64)
    tracemalloc.start()
    plan, taken = Moves(cut, schedule, to_end=True), 0
    most = 0
    while (move := plan.next()) is not None and taken < 60_000:
        if fails and move.kind is Kind.ADVANCE and plan.split():
            fails, plan.parts = False, 1
            continue
        if taken % 1000 == 0:
            plan.ahead(4)
            most = max(most, tracemalloc.get_traced_memory()[0])
        plan.done()
        taken += 1
    tracemalloc.stop()
    assert taken == 60_000
    assert most < 30_000
