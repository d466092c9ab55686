"""Signals wait where a model is not its own: while it runs on stand-ins, and while gradients are delivered."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def uninterrupted(*, second_passes: bool) -> Generator[None]:
    """Hold the signals that Python handles (SIGINT, SIGTERM) back until the block is done.

    Args:
        second_passes: a second signal of one kind is handled at once: for blocks that may take long, or hang.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs its signal handlers in the main thread only
        return
    held: dict[int, FrameType | None] = {}
    before: dict[int, Any] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        if number in held and second_passes:
            before[number](number, frame)
        held[number] = frame

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, hold)
        yield
    finally:
        for number in reversed(before):  # SIGINT last: its own handler may raise as soon as it is back
            signal.signal(number, before[number])
        for number, frame in reversed(held.items()):
            before[number](number, frame)
