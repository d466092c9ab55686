"""Kinds of state and schedules are open: whatever subclass was defined is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def subclasses(kind: type[T]) -> Iterator[type[T]]:
    """All classes below `kind`."""
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)
