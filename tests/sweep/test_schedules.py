"""Every plan, whatever the schedule and the number of chunks: performed on integers, priced, compared with oracles.

`perform` is the executor without tensors: it holds chunk numbers where the sweep holds states.
"""

from __future__ import annotations

from functools import cache
from math import comb
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoint_schedules import EndReverse, Forward, Revolve
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgrad import Binomial, Every, InputError, Keep, Rebuild, Schedule
from slimgrad.sweep.schedules.base import Action, Kind

schedules = st.one_of(
    st.just(Rebuild()), st.just(Keep()), st.builds(Every, st.integers(1, 90)), st.builds(Binomial, st.integers(1, 12))
)


class Cost(NamedTuple):
    """What a performance of a plan took."""

    advances: int
    most_slots: int
    most_advances_of_one_chunk: int


def perform(schedule: Schedule, num_chunks: int) -> Cost:
    """Carry a plan out, asserting that every action finds what it needs."""
    live, slots, reversed_chunks, most = 0, {}, [], 0
    advances = [0] * num_chunks
    for kind, chunk, slot, _ in schedule.actions(num_chunks):
        if kind is Kind.STORE:
            assert chunk == live
            assert slot not in slots
            slots[slot] = live
            most = max(most, len(slots))
        elif kind is Kind.LOAD:
            assert slots[slot] == chunk
            live = chunk
        elif kind is Kind.ADVANCE:
            assert chunk == live
            assert num_chunks - len(reversed_chunks) > chunk + 1  # the state after it is still to be used
            advances[chunk] += 1
            live += 1
        elif kind is Kind.REVERSE:
            assert chunk == live
            reversed_chunks.append(chunk)
        else:
            assert slots.pop(slot) == chunk
    assert reversed_chunks == list(range(num_chunks - 1, -1, -1))
    assert not slots
    return Cost(sum(advances), most, max(advances))


@settings(max_examples=300)
@given(schedule=schedules, num_chunks=st.integers(1, 160))
def test_a_plan_reverses_every_chunk_once_from_its_own_state(schedule: Schedule, num_chunks: int) -> None:
    cost = perform(schedule, num_chunks)
    assert cost.advances == schedule.num_advances(num_chunks)
    assert cost.most_slots == schedule.num_slots(num_chunks)


@given(schedule=schedules, num_chunks=st.integers(1, 100))
def test_before_the_first_reverse_each_chunk_is_advanced_once_in_order(schedule: Schedule, num_chunks: int) -> None:
    first_sweep = []
    for action in schedule.actions(num_chunks):
        if action.kind is Kind.REVERSE:
            break
        first_sweep += [action.chunk] if action.kind is Kind.ADVANCE else []
    assert first_sweep == list(range(num_chunks - 1))


@given(slots=st.integers(1, 6), num_chunks=st.integers(2, 120))
def test_binomial_repeats_no_chunk_more_than_the_theory_says(slots: int, num_chunks: int) -> None:
    t = next(t for t in range(num_chunks + 1) if comb(slots + t, slots) >= num_chunks)
    assert perform(Binomial(slots), num_chunks).most_advances_of_one_chunk <= t


@cache
def fewest_advances(num_chunks: int, slots: int) -> int:
    """By exhaustive search: the first state sits in one of the slots, the next goes after `m` chunks."""
    if num_chunks == 1:
        return 0
    if slots == 1:
        return num_chunks * (num_chunks - 1) // 2
    return min(m + fewest_advances(num_chunks - m, slots - 1) + fewest_advances(m, slots) for m in range(1, num_chunks))


@pytest.mark.parametrize("slots", range(1, 7))
def test_binomial_is_optimal_by_dynamic_programming(slots: int) -> None:
    for num_chunks in range(1, 81):
        assert Binomial(slots).num_advances(num_chunks) == fewest_advances(num_chunks, slots)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_binomial_costs_what_revolve_costs(slots: int) -> None:
    """Against the package checkpoint_schedules, which records the chunk in hand by a Forward of its own."""
    for num_chunks in range(2, 41):
        advanced = 0
        for action in Revolve(num_chunks, slots):
            if isinstance(action, Forward) and not action.write_adj_deps:
                advanced += action.n1 - action.n0
            if isinstance(action, EndReverse):
                break
        assert Binomial(slots).num_advances(num_chunks) == advanced


def test_enough_slots_advance_nothing_again() -> None:
    for num_chunks in (1, 2, 9, 50):
        assert Binomial(max(1, num_chunks - 1)).num_advances(num_chunks) == num_chunks - 1
        assert Keep().num_advances(num_chunks) == Every(1).num_advances(num_chunks) == num_chunks - 1


def test_every_root_is_two_levels() -> None:
    # the least memory of two levels is about 2 sqrt(N), and costs less than one more sweep
    assert Every(32).num_slots(1024) == 62
    assert Every(32).num_advances(1024) == 1023 + 31 * 31
    assert min(Every(k).num_slots(1024) for k in range(1, 1025)) == 62


def test_memory_of_binomial_does_not_grow() -> None:
    assert {Binomial(8).num_slots(n) for n in range(9, 5000, 311)} == {8}


def test_a_plan_is_made_of_integers() -> None:
    assert list(Keep().actions(2)) == [
        Action(Kind.STORE, 0, 0),
        Action(Kind.ADVANCE, 0),
        Action(Kind.REVERSE, 1),
        Action(Kind.LOAD, 0, 0),
        Action(Kind.REVERSE, 0),
        Action(Kind.FREE, 0, 0),
    ]


@pytest.mark.parametrize("slots", [3, 2000])
def test_neither_chunks_nor_slots_make_a_plan_deep(slots: int) -> None:
    """Budgets of models with little state buy thousands of slots."""
    assert perform(Binomial(slots), 2500).advances == Binomial(slots).num_advances(2500)


def test_schedules_are_values() -> None:
    assert Every(4) == Every(4)
    assert Every(4) != Every(5)
    assert Rebuild() != Keep()
    assert hash(Binomial(3, store="disk")) == hash(Binomial(3, store="disk"))
    with pytest.raises(AttributeError):
        Every(4).k = 5


@pytest.mark.parametrize("make", [lambda: Every(0), lambda: Every(-1)])
def test_every_needs_a_positive_k(make) -> None:
    with pytest.raises(InputError, match=r"expected k >= 1"):
        make()


def test_binomial_needs_a_slot() -> None:
    with pytest.raises(InputError, match=r"Binomial\(slots=0\): expected slots >= 1"):
        Binomial(0)


@pytest.mark.parametrize(
    "make", [Rebuild, Keep, lambda store: Every(2, store=store), lambda store: Binomial(2, store=store)]
)
def test_a_store_has_a_known_name_or_is_a_folder(make) -> None:
    for store in ("device", "host", "disk", Path("somewhere")):
        assert make(store=store).store == store
    with pytest.raises(InputError, match=r"store='gpu': expected 'device', 'host', 'disk', or a pathlib.Path"):
        make(store="gpu")
