"""Schedules as text."""

from __future__ import annotations

from pathlib import Path

import pytest

import slimgrad as sg
from slimgrad.bytelm import parse_schedule


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("auto", None),
        ("rebuild", sg.Rebuild()),
        ("keep", sg.Keep()),
        ("every:8", sg.Every(8)),
        ("binomial:16", sg.Binomial(16)),
        ("keep@disk", sg.Keep(store="disk")),
        ("every:3@host", sg.Every(3, store="host")),
        ("rebuild@states/here", sg.Rebuild(store=Path("states/here"))),
    ],
)
def test_every_schedule_can_be_written(text: str, schedule: sg.Schedule | None) -> None:
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize("text", ["", "often", "every", "every:", "every:x", "every:-1", "rebuild:3", "rebuild:"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(sg.InputError, match="expected one of auto, rebuild, keep, every:K, binomial:SLOTS"):
        parse_schedule(text)


@pytest.mark.parametrize("text", ["auto@disk", "keep@", "every:2@", "@disk"])
def test_a_store_without_a_schedule_or_a_name_is_refused(text: str) -> None:
    with pytest.raises(sg.InputError, match=r"each but auto .* end in @device, @host, @disk or @FOLDER"):
        parse_schedule(text)


def test_a_number_that_a_schedule_cannot_have_is_refused() -> None:
    with pytest.raises(sg.InputError):
        parse_schedule("every:0")
