"""The way that is chosen fits, is about the fastest that does, and has the largest chunk among the fastest."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slimgrad as sg
from slimgrad.budget.choose import Chooser, Slack, Way, Work
from slimgrad.budget.fit import SHRUNK, Fit, Point, Small
from slimgrad.budget.probe import Costs

SIZES = (16, 64, 128, 256, 1024)
SLACK = Slack("", threshold=1 << 20, small=0.2, share=0.05, fixed=100_000)
NEAR = 1.03


def costs(*, plain: int = 0, rows: float = 0.0, fixed_seconds: float = 1e-3, tape: float = 0.8) -> Costs:
    """1,000 bytes and a millionth of a second for each token of a chunk; attention to rows, where there are any."""
    grows = rows > 0

    def fit(fixed: float, token: float, pair: float = 0.0, *, seconds: bool = False) -> Fit:
        def value(chunk: int, before: int) -> float:
            return fixed + token * chunk + (pair * chunk * (before + (chunk / 2 if seconds else 0)) if grows else 0)

        places = [(size, size * k) for size in SIZES for k in range(4)]
        return Fit([Point(*place, value(*place)) for place in places], grows=grows, seconds=seconds)

    return Costs(
        bytes={
            "forward": fit(0, 500, 2), "reverse": fit(0, 1000, 4), "kept": fit(0, 800, 1), "held": fit(10_000, 0),
        },
        small={name: Small([fit(500, 0)] * len(SHRUNK)) for name in ("forward", "reverse", "kept")},
        seconds={
            "forward": fit(fixed_seconds, 0.4e-6, 1e-9, seconds=True),
            "reverse": fit(fixed_seconds, 1e-6, 3e-9, seconds=True),
            "tape": fit(fixed_seconds, tape * 1e-6, 3e-9, seconds=True),
        },
        plain=plain, sums=5_000, rows=rows, row_grads=rows, final=1000, gradients=200_000, records=4,
    )  # fmt: skip


KINDS = {"sums": {}, "plain tensors": {"plain": 40_000}, "rows": {"rows": 64.0}}


@cache
def chooser(kind: str, *lengths: int, at_once: bool = False, schedule: sg.Schedule | None = None) -> Chooser:
    return Chooser(costs(**KINDS[kind]), Work(lengths, at_once=at_once, to_end=at_once, schedule=schedule), SLACK)


def best(found: Chooser, num_bytes: int) -> Way:
    way = found.best(num_bytes)
    assert way is not None
    assert way.num_bytes <= num_bytes
    return way


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(budget=st.floats(1.0, 4000.0), more=st.floats(1.0, 10.0))
def test_it_fits_and_more_memory_is_never_slower(kind: str, budget: float, more: float) -> None:
    found = chooser(kind, 20_000)
    least = found.smallest().num_bytes
    small, large = int(least * budget), int(least * budget * more)
    assert best(found, large).seconds <= NEAR * best(found, small).seconds


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_is_the_smallest(kind: str) -> None:
    found = chooser(kind, 20_000)
    least = found.smallest()
    assert found.best(least.num_bytes - 1) is None
    assert best(found, least.num_bytes).num_bytes == least.num_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1.2, 20])
def test_nothing_is_clearly_faster(kind: str, times: float) -> None:
    """Every chunk of a grid, every tape of some, every number of slots of some."""
    found = chooser(kind, 5_000)
    num_bytes = int(found.smallest().num_bytes * times)
    way = best(found, num_bytes)
    schedules: list[sg.Schedule] = [sg.Rebuild(), *(sg.Binomial(slots) for slots in (1, 2, 3, 5, 8, 13, 30, 100))]
    tapes = (0, 1, 2, 3, 5, 8, 13, 40, 100, 400)
    fitting = [
        other
        for chunk in [*range(16, 5000, 83), *(-(-5000 // n) for n in range(1, 8))]
        for schedule in schedules
        for tape in tapes
        if (other := found.way(chunk, dataclasses.replace(schedule, tape=tape))).num_bytes <= num_bytes
    ]
    fastest = min(fitting, key=lambda one: one.seconds)
    assert way.seconds <= 1.12 * fastest.seconds, fastest  # the sizes that are tried are a fifth apart


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_fastest_the_largest_chunk(kind: str) -> None:
    found = chooser(kind, 20_000)
    num_bytes = 20 * found.smallest().num_bytes
    way = best(found, num_bytes)
    for chunk in found.chunks():
        if chunk > way.chunk:
            fitting = [one for one in found.ways(chunk, num_bytes) if one.num_bytes <= num_bytes]
            assert all(way.seconds * NEAR < NEAR * NEAR * one.seconds for one in fitting)


def test_the_sizes_that_are_tried() -> None:
    sizes = chooser("sums", 20_003).chunks()
    assert (sizes[0], sizes[-1]) == (16, 20_003)
    assert all(b <= 1.5 * a or b - a <= 4 or a >= 20_003 / 3 for a, b in itertools.pairwise(sizes))
    assert all(20_003 % size != 1 for size in sizes)  # or buffers of rows would have to grow for one row
    assert chooser("sums", 1).chunks() == [1]
    assert chooser("sums", 2).chunks() == [1, 2]


def test_spare_memory_buys_a_tape_and_the_whole_of_it() -> None:
    found = chooser("sums", 5_000)
    way = best(found, 10**9)
    assert way.schedule.tape * way.chunk >= 5_000


def test_states_that_do_not_fit_have_as_many_slots_as_do() -> None:
    found = Chooser(costs(plain=1_000_000, fixed_seconds=1e-5), Work([100_000]), SLACK)
    way = best(found, 12_000_000)
    assert isinstance(way.schedule, sg.Binomial)
    more = found.way(way.chunk, sg.Binomial(way.schedule.slots + 2))
    assert more.num_bytes > 12_000_000


@pytest.mark.parametrize("schedule", [sg.Keep(), sg.Every(7), sg.Binomial(3, store="host")])
def test_a_schedule_that_is_named_is_kept(schedule: sg.Schedule) -> None:
    found = chooser("plain tensors", 5_000, schedule=schedule)
    for times in (1.1, 500):
        way = best(found, int(times * found.smallest().num_bytes))
        assert dataclasses.replace(way.schedule, tape=0) == schedule
    assert way.schedule.tape


def test_states_in_a_file_are_no_memory() -> None:
    in_memory, in_file = (chooser("plain tensors", 5_000).way(20, sg.Keep(store=place)) for place in ("device", "disk"))
    assert in_memory.account["kept states"] > 20 * in_file.account["kept states"] > 0


def test_several_sequences() -> None:
    """One after the other they take what the longest takes, and results; at once, all states. None has a tape."""
    one, others = chooser("plain tensors", 5_000), (5_000, 3_000, 4_000)
    way = one.way(100, sg.Keep())
    in_turn = chooser("plain tensors", *others).way(100, sg.Keep())
    at_once = chooser("plain tensors", *others, at_once=True).way(100, sg.Keep())
    assert in_turn.account["kept states"] == way.account["kept states"]
    assert at_once.account["kept states"] > 2.5 * way.account["kept states"]
    assert in_turn.account["one chunk"] == way.account["one chunk"] == at_once.account["one chunk"]
    assert in_turn.seconds == pytest.approx(way.seconds * 12_000 / 5_000, rel=0.02)
    assert not best(chooser("plain tensors", *others), 10**9).schedule.tape
    assert chooser("rows", *others).way(100, sg.Keep()).account["rows"] > 12_000 * 128


def test_the_account_adds_up() -> None:
    way = chooser("rows", 5_000).way(250, sg.Rebuild(tape=4))
    assert way.num_bytes == sum(way.account.values())
    assert way.account["rows"] == 64 * (5_000 // 64 + 1) * 64 + 64 * 5_000
    assert way.account["kept states"] == 5_000  # the sums before the tape
    assert way.account["gradients"] == 200_000
    assert way.account["checksums"] == 16 * 4 * 20
    # three graphs beside the last chunk: with 4,000, 4,250 and 4,500 tokens before them
    assert way.account["tape"] == pytest.approx(3 * 250 * (800 + 4_250), rel=1e-6)
    assert way.account["one chunk"] == pytest.approx(250 * (1000 + 4 * 4_750), rel=1e-6)
    live = way.num_bytes - way.account["allocator"]
    assert SLACK.fixed < way.account["allocator"] <= SLACK.fixed + SLACK.share * live + SLACK.small * live


def test_a_forward_sweep_alone() -> None:
    found = Chooser(costs(), Work([5_000], differentiates=False), SLACK)
    way = best(found, 10**9)
    assert (way.chunk, way.schedule, way.account["kept states"]) == (5_000, sg.Rebuild(), 0)


def test_sizes_may_be_kept_to() -> None:
    found = Chooser(costs(), Work([20_000]), SLACK)
    found.keep_to([16, 100, 1024])
    assert [size for size in found.chunks() if size <= 1024] == [16, 100, 1024]
    assert found.chunks()[-1] == 20_000
