"""Where a sequence is cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """A stretch of the time axis: its first token, and the one after its last."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"tokens {self.start} to {self.stop - 1}"

    def pieces(self, count: int) -> list[Span]:
        """The span in `count` pieces of about the same length."""
        edges = [self.start + (self.stop - self.start) * piece // count for piece in range(count + 1)]
        return [Span(*edge) for edge in pairwise(edges)]


@dataclass(frozen=True)
class Cut:
    """A sequence in chunks, by number.

    A remainder of a single token joins the chunk before it: many models take another path for one token (a step of
    generation, in place). Chunks of one token, asked for, stay.

    Args:
        length: tokens, at least 1.
        chunk: tokens per chunk, at least 1; the last chunk may have fewer, or one more.
    """

    length: int
    chunk: int

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.chunk)
        return max(1, whole + (rest > 0) - (rest == 1 < self.chunk))

    def __iter__(self) -> Iterator[Span]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Span:
        count = len(self)
        if not 0 <= number < count:
            raise IndexError(f"chunk {number} of {count}")
        return Span(number * self.chunk, self.length if number == count - 1 else (number + 1) * self.chunk)
