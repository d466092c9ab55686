"""How the reverse sweep finds the state before each chunk: schedules as values, planning as integers.

A schedule is a frozen value that the caller passes. Its `plan(num_chunks)` yields integer actions, which one executor
(`run.Run`) carries out; nothing here imports torch, so a plan can be tested, drawn and priced by itself.

| schedule | states kept | chunks advanced again | good for |
|---|---|---|---|
| `Rebuild()` | sums: none; plain tensors: one per chunk | 0 | prefix sums, key-value caches, small gates |
| `Keep()` | all, one per chunk | 0 | short sequences, any state |
| `Every(k)` | ceil(N/k) + k - 2 | N - ceil(N/k) - (last segment) | long sequences, two levels |
| `Binomial(s)` | s | the least that s slots allow | fixed memory whatever the length |

The first sweep advances N - 1 chunks in every schedule: the last chunk is reversed straight from the live state.
Binomial schedules: Griewank & Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from math import comb
from pathlib import Path
from typing import NamedTuple

from slimgrad.errors import InputError


class Kind(IntEnum):
    """What an action does. "Live" is the one state in hand, which stands before some chunk."""

    STORE = 0  # keep the live state, which stands before `chunk`, in `slot`
    LOAD = 1  # make the state in `slot`, which stands before `chunk`, the live one
    ADVANCE = 2  # take the live state through `chunk`, for the next state alone
    REVERSE = 3  # rebuild `chunk` with a graph, and backpropagate through it
    FREE = 4  # forget `slot`


class Action(NamedTuple):
    """One step of a plan: integers only."""

    kind: Kind
    chunk: int
    slot: int = -1


Plan = Iterator[Action]


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """What all schedules share: where kept states lie.

    `store` is "device" (beside the state), "host" (main memory), "disk" (a temporary file) or a `Path` (a folder for
    that file).
    """

    store: str | Path = "device"

    rolls_back = False

    def __post_init__(self) -> None:
        if not isinstance(self.store, Path) and self.store not in ("device", "host", "disk"):
            raise InputError(
                f"store={self.store!r}: expected 'device', 'host', 'disk', or a pathlib.Path of a folder for the file"
            )

    def plan(self, num_chunks: int) -> Plan:
        raise NotImplementedError

    def num_slots(self, num_chunks: int) -> int:
        """How many slots the plan for `num_chunks` chunks uses at most."""
        raise NotImplementedError

    def num_advances(self, num_chunks: int) -> int:
        """How many chunks are advanced for their states alone, the first sweep's N - 1 included."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Keep(_Schedule):
    """Keep the state before every chunk.

    Memory: N - 1 states. Extra compute: none beyond the first sweep. Exact in every bit for any state.
    Source: plain checkpointing along time; Algorithm 1 without its subtraction.
    """

    def plan(self, num_chunks: int) -> Plan:
        """Store before each chunk but the last; reverse each from its own slot."""
        last = num_chunks - 1
        for chunk in range(last):
            yield Action(Kind.STORE, chunk, chunk)
            yield Action(Kind.ADVANCE, chunk)
        yield Action(Kind.REVERSE, last)
        for chunk in range(last - 1, -1, -1):
            yield Action(Kind.LOAD, chunk, chunk)
            yield Action(Kind.REVERSE, chunk)
            yield Action(Kind.FREE, chunk, chunk)

    def num_slots(self, num_chunks: int) -> int:
        """One per chunk but the last."""
        return num_chunks - 1

    def num_advances(self, num_chunks: int) -> int:
        """The first sweep only."""
        return num_chunks - 1


@dataclass(frozen=True, kw_only=True)
class Rebuild(Keep):
    """Roll prefix sums and growing states back instead of keeping them; keep plain tensors before every chunk.

    Memory: one state, whatever the length, where the model has only sums (O(1), Algorithm 1 of the paper); plus N - 1
    copies of its plain tensors where it has any. Extra compute: none beyond the first sweep. Exact in every bit: sums
    are integers (see `accumulator`), so subtraction undoes addition.
    """

    rolls_back = True


@dataclass(frozen=True)
class Every(_Schedule):
    """Keep every k-th state, and a segment's states while that segment is reversed.

    Memory: ceil(N/k) + k - 2 states at most; least, about 2 sqrt(N), at k = sqrt(N). Extra compute: every chunk is
    advanced once more, except each segment's last and all of the final segment. Exact for any state.
    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, along time instead of depth.
    """

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise InputError(f"Every(k={self.k}): expected k >= 1")

    def plan(self, num_chunks: int) -> Plan:
        """Sweep once keeping segment starts; then segment by segment, last first."""
        starts = list(range(0, num_chunks, self.k))
        for segment, start in enumerate(starts):
            yield Action(Kind.STORE, start, segment)
            if start != starts[-1]:
                for chunk in range(start, min(start + self.k, num_chunks)):
                    yield Action(Kind.ADVANCE, chunk)
        for segment in range(len(starts) - 1, -1, -1):
            start, stop = starts[segment], min(starts[segment] + self.k, num_chunks)
            if segment != len(starts) - 1:
                yield Action(Kind.LOAD, start, segment)
            yield from self._reverse_segment(start, stop, outer_slot=segment, inner_slot=len(starts))

    def _reverse_segment(self, start: int, stop: int, *, outer_slot: int, inner_slot: int) -> Plan:
        def slot_of(chunk: int) -> int:
            return outer_slot if chunk == start else inner_slot + chunk - start - 1

        for chunk in range(start, stop - 1):
            if chunk > start:
                yield Action(Kind.STORE, chunk, slot_of(chunk))
            yield Action(Kind.ADVANCE, chunk)
        for chunk in range(stop - 1, start - 1, -1):
            if chunk < stop - 1:
                yield Action(Kind.LOAD, chunk, slot_of(chunk))
            yield Action(Kind.REVERSE, chunk)
            if chunk == start or chunk < stop - 1:
                yield Action(Kind.FREE, chunk, slot_of(chunk))

    def num_slots(self, num_chunks: int) -> int:
        """One per segment left, and the inner chunks of the segment in hand that are neither its first nor its last."""
        segments = -(-num_chunks // self.k)
        final = num_chunks - (segments - 1) * self.k
        return max(segments + max(0, final - 2), (segments - 1 + max(0, self.k - 2)) if segments > 1 else 0)

    def num_advances(self, num_chunks: int) -> int:
        """The first sweep, and each segment but the final one again without its last chunk."""
        segments = -(-num_chunks // self.k)
        return num_chunks - 1 + (segments - 1) * (self.k - 1)


@dataclass(frozen=True)
class Binomial(_Schedule):
    """Keep at most `slots` states, and advance again as few chunks as that allows.

    Memory: `slots` states, whatever the length. Extra compute: the least possible; with t the smallest number for which
    C(slots + t, slots) >= N, no chunk is advanced more than t times. Exact for any state.
    Source: Griewank & Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000.
    """

    slots: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise InputError(f"Binomial(slots={self.slots}): expected slots >= 1 (the state before the first chunk)")

    def plan(self, num_chunks: int) -> Plan:
        """Keep the first state, then divide what follows."""
        yield Action(Kind.STORE, 0, 0)
        yield from self._reverse(0, num_chunks, 0)
        yield Action(Kind.FREE, 0, 0)

    def _reverse(self, start: int, stop: int, slot: int) -> Plan:
        """Reverse chunks [start, stop), the live state being the one before `start`, which `slot` keeps.

        The right part recurses (at most `slots` deep), the left part loops.
        """
        free = self.slots - 1 - slot
        while stop - start > 1 and free > 0:
            middle = start + _split(stop - start, free + 1)
            for chunk in range(start, middle):
                yield Action(Kind.ADVANCE, chunk)
            if stop - middle > 1:  # a single chunk is reversed from the live state, and needs no slot
                yield Action(Kind.STORE, middle, slot + 1)
            yield from self._reverse(middle, stop, slot + 1)
            if stop - middle > 1:
                yield Action(Kind.FREE, middle, slot + 1)
            yield Action(Kind.LOAD, start, slot)
            stop = middle
        for last in range(stop - 1, start - 1, -1):
            if last < stop - 1:
                yield Action(Kind.LOAD, start, slot)
            for chunk in range(start, last):
                yield Action(Kind.ADVANCE, chunk)
            yield Action(Kind.REVERSE, last)

    def num_slots(self, num_chunks: int) -> int:
        """`slots`, or fewer where the sequence has fewer chunks."""
        return min(self.slots, max(1, num_chunks - 1))

    def num_advances(self, num_chunks: int) -> int:
        """t N - C(slots + t, t - 1), with t as in the class docstring (Griewank & Walther, proposition 1)."""
        if num_chunks == 1:
            return 0
        t = _repetitions(num_chunks, self.slots)
        return t * num_chunks - comb(self.slots + t, t - 1)


Schedule = Rebuild | Keep | Every | Binomial


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
