"""Standard output that may go away: a pipe whose reader ends, or a disk that is full."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from slimgrad.errors import RunError

CANNOT_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Screen:
    """Standard output for a run: when it cannot be written any more, the run says so once and goes on without it."""

    def __init__(self) -> None:
        self._file: TextIO = sys.stdout

    def write(self, text: str) -> int:
        """As a file does."""
        try:
            return self._file.write(text)
        except OSError as error:
            return self._go_on_without(error, len(text))

    def flush(self) -> None:
        """As a file does."""
        try:
            self._file.flush()
        except OSError as error:
            self._go_on_without(error, 0)

    def _go_on_without(self, error: OSError, length: int) -> int:
        with suppress(OSError):
            print(f"slimgrad: standard output: {error.strerror}. The run goes on without it", file=sys.stderr)
        forget_output()
        self._file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def forget_output() -> None:
    """Whatever is still written to standard output goes nowhere: else the interpreter fails again as it ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_is_gone(error: OSError) -> RunError:
    """For a command that has nothing to do but to write there."""
    forget_output()
    return RunError(f"standard output: expected to write to it, got: {error.strerror}")


def flush() -> None:
    """Raise `RunError` if what was printed cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise output_is_gone(error) from error
