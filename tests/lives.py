"""Processes that are killed: forked, since torch then is imported once; each says through a pipe how far it is."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any


def begin(live: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    """A child that calls `live(*arguments, pipe)` and ends. Its process number, and where to read what it says."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            live(*arguments, writing)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    return child, reading
