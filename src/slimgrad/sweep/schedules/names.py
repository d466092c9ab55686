"""Schedules by name, as the command line and a saved configuration have them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from slimgrad.errors import InputError
from slimgrad.sweep.kinds import subclasses
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.binomial import Binomial
from slimgrad.sweep.schedules.every import Every
from slimgrad.sweep.schedules.keep import Keep, Rebuild


def _by_name() -> dict[str, tuple[Callable[..., Schedule], str]]:
    """Every schedule, and the number that it takes (or ""), by its name in lower case."""
    kinds = dict.fromkeys([Rebuild, Keep, Every, Binomial, *subclasses(Schedule)])
    numbers = {kind: [f.name for f in fields(kind) if not f.kw_only] for kind in kinds}
    return {kind.__name__.lower(): (kind, " ".join(names)) for kind, names in numbers.items()}


_NAMES = [f"{name}:{number.upper()}" if number else name for name, (_, number) in _by_name().items()]
FORMS = (
    f"{', '.join(['auto', *sorted(_NAMES, reverse=True)])}; each but auto may go on with +tape:CHUNKS, and end "
    "in @device, @host, @disk or @FOLDER"
)


def parse_schedule(text: str) -> Schedule | None:
    """The schedule that a text like "every:8", "rebuild+tape:4" or "binomial:16@disk" stands for; None for "auto".

    Raises:
        InputError: no schedule is written so.
    """
    if text == "auto":
        return None
    words, at, store = text.partition("@")
    words, plus, chunks = words.partition("+tape:")
    name, _, number = words.partition(":")
    stored: dict[str, Any] = {}
    if at:
        stored["store"] = store if store in ("device", "host", "disk") else Path(store)
    if plus and chunks.isdecimal():
        stored["tape"] = int(chunks)
    if (store or not at) and (chunks.isdecimal() or not plus):
        kind, wanted = _by_name().get(name, (None, ""))
        if kind is not None and words == name and not wanted:
            return kind(**stored)
        if kind is not None and wanted and number.isdecimal():
            return kind(int(number), **stored)
    raise InputError(f"schedule {text!r}: expected one of {FORMS}")


def schedule_as_text(schedule: Schedule) -> str:
    """What `parse_schedule` reads; a schedule of somebody else's by its own text. Where rows lie is not in it."""
    kind = type(schedule).__name__.lower()
    numbers = [str(getattr(schedule, f.name)) for f in fields(schedule) if not f.kw_only]
    tape = f"+tape:{schedule.tape}" if schedule.tape else ""
    store = "" if schedule.store == "device" else f"@{schedule.store}"
    return ":".join([kind, *numbers]) + tape + store


def require_folder(text: str) -> None:
    """Refuse a schedule whose states go to a folder that is not there, or cannot be written to."""
    store = getattr(parse_schedule(text), "store", None)
    if isinstance(store, Path) and not (store.is_dir() and os.access(store, os.W_OK)):
        raise InputError(f"schedule {text!r}: expected a folder to write to, found none at {store}. Make it first")
