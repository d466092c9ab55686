"""Ctrl-C, SIGTERM, a closed terminal (SIGHUP): leave the gradient, finish everything else, save, and stop.

A gradient is left at once, or, where it can be saved, after the chunk at hand (see `bytelm.journalled`): parameters and
moments are still those of the step before. A step of the optimiser, a validation or a snapshot is finished first. A
second signal stops where it finds the program; what is on disk is whole even then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop.

    Attributes:
        signal_number: SIGINT, SIGTERM or SIGHUP.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Stop:
    """Whether a signal has come, and whether it may interrupt what is going on."""

    def __init__(self) -> None:
        self._signal_number: int | None = None
        self._interruptible = False

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self._signal_number is not None

    @contextmanager
    def listening(self) -> Generator[Stop]:
        """Take these signals within the block, but for SIGHUP where it is ignored already (`nohup`).

        Python hands signals to the main thread: elsewhere, nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM, *_closed_terminal()):
                before[number] = signal.signal(number, self._handle)
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Within the block a signal raises `Interrupted`; one that came before it, too."""
        self.check()
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._signal_number is not None:
            raise Interrupted(self._signal_number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._signal_number = self._signal_number is not None, number
        if self._interruptible or again:
            raise Interrupted(number)


def _closed_terminal() -> list[int]:
    number = getattr(signal, "SIGHUP", None)
    return [] if number is None or signal.getsignal(number) == signal.SIG_IGN else [number]
