"""Keep a fixed number of states, whatever the length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

from slimgrad.errors import InputError
from slimgrad.sweep.schedules.base import Action, Kind, Schedule


@dataclass(frozen=True)
class Binomial(Schedule):
    """Keep at most `slots` states, and advance again as few chunks as that allows.

    Memory: `slots` states, whatever the length. Extra compute: the least possible; with t the smallest number for which
    C(slots + t, slots) >= N, no chunk is advanced more than t times. Exact for any state.

    Args:
        slots: states kept at most, 1 or more; else an `InputError`.
        store, rows, tape: see `Schedule`.

    Source: Griewank & Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000.
    """

    slots: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise InputError(f"Binomial(slots={self.slots}): expected slots >= 1 (the state before the first chunk)")

    def actions(self, num_chunks: int) -> Iterator[Action]:
        """Keep the first state, then divide what follows: the right part first, the left parts wait for their turn."""
        yield Action(Kind.STORE, 0, 0)
        start, stop, slot = 0, num_chunks, 0  # the live state is the one before `start`, which `slot` keeps
        waiting: list[tuple[int, int, int]] = []  # of each division: the left part's start, the right one's, its end
        while True:
            while stop - start > 1 and slot < self.slots - 1:
                middle = start + _split(stop - start, self.slots - slot)
                for chunk in range(start, middle):
                    yield Action(Kind.ADVANCE, chunk)
                slot += 1
                if stop - middle > 1:  # a single chunk is reversed from the live state, and needs no slot
                    yield Action(Kind.STORE, middle, slot)
                waiting.append((start, middle, stop))
                start = middle
            for last in range(stop - 1, start - 1, -1):
                if last < stop - 1:
                    yield Action(Kind.LOAD, start, slot)
                for chunk in range(start, last):
                    yield Action(Kind.ADVANCE, chunk)
                yield Action(Kind.REVERSE, last)
            if not waiting:
                break
            start, stop, end = waiting.pop()
            slot = len(waiting)
            if end - stop > 1:
                yield Action(Kind.FREE, stop, slot + 1)
            yield Action(Kind.LOAD, start, slot)
        yield Action(Kind.FREE, 0, 0)

    def num_slots(self, num_chunks: int) -> int:
        """`slots`, or fewer where the sequence has fewer chunks."""
        return min(self.slots, max(1, num_chunks - 1))

    def num_advances(self, num_chunks: int) -> int:
        """t N - C(slots + t, t - 1), with t as in the class docstring (Griewank & Walther, proposition 1)."""
        if num_chunks == 1:
            return 0
        t = _repetitions(num_chunks, self.slots)
        return t * num_chunks - comb(self.slots + t, t - 1)


def _repetitions(num_chunks: int, slots: int) -> int:
    """The smallest t with C(slots + t, slots) >= num_chunks."""
    t = 0
    while comb(slots + t, slots) < num_chunks:
        t += 1
    return t


def _split(num_chunks: int, slots: int) -> int:
    """How many chunks to advance before the next state is kept, with `slots` states in all (this one included).

    Any m with C(s+t-2, s) <= m <= C(s+t-1, s) and C(s+t-2, s-1) <= n - m <= C(s+t-1, s-1) is optimal; take the largest.
    """
    t = _repetitions(num_chunks, slots)
    return max(1, min(comb(slots + t - 1, slots), num_chunks - comb(slots + t - 2, slots - 1)))
