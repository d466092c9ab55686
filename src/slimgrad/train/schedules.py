"""Schedules by name, as the command line and a saved configuration have them."""

from __future__ import annotations

import os
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
    words, at, store = text.partition("@")
    name, _, number = words.partition(":")
    stored: dict[str, Any] = {}
    if at:
        stored["store"] = store if store in ("device", "host", "disk") else Path(store)
    if store or not at:
        if words in _PLAIN:
            return _PLAIN[words](**stored)
        if name in _NUMBERED and number.isdecimal():
            return _NUMBERED[name](int(number), **stored)
    raise InputError(f"schedule {text!r}: expected one of {FORMS}")


def require_folder(text: str) -> None:
    """Refuse a schedule whose states go to a folder that is not there, or cannot be written to."""
    store = getattr(parse_schedule(text), "store", None)
    if isinstance(store, Path) and not (store.is_dir() and os.access(store, os.W_OK)):
        raise InputError(f"schedule {text!r}: expected a folder to write to, found none at {store}. Make it first")
