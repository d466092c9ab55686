"""Keep the state before every chunk; or only what cannot be rolled back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slimgrad.sweep.schedules.base import Action, Kind, Schedule


@dataclass(frozen=True, kw_only=True)
class Keep(Schedule):
    """Keep the state before every chunk.

    Memory: N - 1 states. Extra compute: none beyond the first sweep. Exact in every bit for any state.

    Args:
        store, rows, tape: see `Schedule`.

    Source: plain checkpointing along time; Algorithm 1 without its subtraction.
    """

    def actions(self, num_chunks: int) -> Iterator[Action]:
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

    Args:
        store, rows, tape: see `Schedule`.
    """

    rolls_back = True
