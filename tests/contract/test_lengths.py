"""Sequences that chunks do not divide: a remainder of one token is no chunk, unless chunks of one were asked for.

Many models take another path for one token (a step of generation, in place).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import slimgrad as sg
from slimgrad.sweep.cut import Cut
from tests.contract import contract
from tests.contract.cases import CASES, Built, shortened, tokens
from tests.toy_models import GatedRecurrence

CHUNK = 9
LENGTHS = [chunks * CHUNK + 1 for chunks in range(1, 11)]
every_model = pytest.mark.parametrize("build", [build for _, build in CASES], ids=[name for name, _ in CASES])
every_way = pytest.mark.parametrize("way", contract.WAYS)


@every_model
@pytest.mark.parametrize("length", LENGTHS)
def test_one_token_more_than_whole_chunks(build: Callable[[], Built], length: int) -> None:
    contract.check(lambda: shortened(build, length), chunk=CHUNK)


@every_way
@pytest.mark.parametrize("length", [LENGTHS[0], LENGTHS[-1]])
def test_one_token_more_by_every_way_in(way: str, length: int) -> None:
    for _, build in CASES:
        contract.check(lambda build=build: shortened(build, length), chunk=CHUNK, way=way, from_state=True)


class NoSteps(GatedRecurrence):
    """Has no path for one token, as for a step of generation that is not its subject."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        assert inputs.shape[1] > 1, "a chunk of one token"
        return super().forward(inputs, state)


@every_way
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Binomial(2)], ids=["Rebuild", "Binomial"])
def test_no_model_sees_one_token(way: str, length: int, schedule: sg.Schedule) -> None:
    contract.chunked(way, NoSteps(), tokens(length), None, chunk=CHUNK, schedule=schedule)
    sg.evaluate(NoSteps(), tokens(length), chunk=CHUNK)


def test_a_model_would_see_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation."""
    monkeypatch.setattr(Cut, "__len__", lambda self: -(-self.length // self.chunk))
    for way in contract.WAYS:
        with pytest.raises(AssertionError, match="a chunk of one token"):
            contract.chunked(way, NoSteps(), tokens(LENGTHS[3]), None, chunk=CHUNK)
    with pytest.raises(AssertionError, match="a chunk of one token"):
        sg.evaluate(NoSteps(), tokens(LENGTHS[3]), chunk=CHUNK)


def told(length: int, chunk: int) -> list[tuple[int, int]]:
    """The spans of the reverse sweep, first to last."""
    events: list[sg.Event] = []
    sg.backward(GatedRecurrence(), tokens(length), chunk=chunk, on_chunk=events.append)
    assert {event.length for event in events} == {length}
    return [(event.start, event.stop) for event in events if event.phase == "reverse"][::-1]


def test_chunks_are_cut_as_the_contract_says() -> None:
    for length, chunk in [(10, 9), (11, 9), (18, 9), (19, 9), (20, 9), (9, 9), (2, 9), (3, 2), (4, 2), (7, 3)]:
        assert told(length, chunk) == contract.spans(length, chunk), (length, chunk)
    assert told(10, 9) == [(0, 10)]
    assert told(19, 9) == [(0, 9), (9, 19)]


def test_chunks_of_one_token_that_were_asked_for_stay() -> None:
    for length in (1, 2, 5, 10):
        assert told(length, 1) == [(token, token + 1) for token in range(length)]
    assert told(1, 9) == [(0, 1)]  # there is no other
