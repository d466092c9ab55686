"""Schedules by name, as the command line and a saved configuration have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimgrad.errors import InputError
from slimgrad.sweep.schedule import Binomial, Every, Keep, Rebuild, Schedule

FORMS = "auto, rebuild, keep, every:K, binomial:SLOTS; each but auto may end in @device, @host, @disk or @FOLDER"
_PLAIN: dict[str, Callable[..., Schedule]] = {"rebuild": Rebuild, "keep": Keep}
_NUMBERED: dict[str, Callable[..., Schedule]] = {"every": Every, "binomial": Binomial}


def parse_schedule(text: str) -> Schedule | None:
    """The schedule that a text like "every:8" or "binomial:16@disk" stands for; None for "auto".

    Raises:
        InputError: no schedule is written so.
    """
    if text == "auto":
        return None
    words, _, store = text.partition("@")
    name, _, number = words.partition(":")
    stored: dict[str, Any] = {}
    if store:
        stored["store"] = store if store in ("device", "host", "disk") else Path(store)
    if name in _PLAIN and not number:
        return _PLAIN[name](**stored)
    if name in _NUMBERED and number.isdecimal():
        return _NUMBERED[name](int(number), **stored)
    raise InputError(f"schedule {text!r}: expected one of {FORMS}")
