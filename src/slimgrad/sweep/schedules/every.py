"""Keep every k-th state, and once more the states of one segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slimgrad.errors import InputError
from slimgrad.sweep.schedules.base import Action, Kind, Schedule


@dataclass(frozen=True)
class Every(Schedule):
    """Keep every k-th state, and a segment's states while that segment is reversed.

    Memory: ceil(N/k) + k - 2 states at most; least, about 2 sqrt(N), at k = sqrt(N). Extra compute: every chunk is
    advanced once more, except each segment's last and all of the final segment. Exact for any state.

    Args:
        k: chunks from one kept state to the next, 1 or more; else an `InputError`.
        store, rows, tape: see `Schedule`.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, along time instead of depth.
    """

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise InputError(f"Every(k={self.k}): expected k >= 1")

    def actions(self, num_chunks: int) -> Iterator[Action]:
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

    def _reverse_segment(self, start: int, stop: int, *, outer_slot: int, inner_slot: int) -> Iterator[Action]:
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
