"""How the reverse sweep finds the state before each chunk: schedules as values, planning as integers.

A schedule is a frozen value that the caller passes. Its `actions(num_chunks)` yields integer actions, which a `Run`
carries out; nothing here imports torch, so that they can be tested, drawn and priced by themselves.

| schedule | states kept | chunks advanced again | good for |
|---|---|---|---|
| `Rebuild()` | sums: none; plain tensors: one per chunk | 0 | prefix sums, key-value caches, small gates |
| `Keep()` | all, one per chunk | 0 | short sequences, any state |
| `Every(k)` | ceil(N/k) + k - 2 | N - ceil(N/k) - (last segment) | long sequences, two levels |
| `Binomial(s)` | s | the least that s slots allow | fixed memory whatever the length |

The first sweep advances N - 1 chunks in every schedule: the last chunk is reversed straight from the live state. To add
a schedule, subclass `Schedule`. Binomial schedules: Griewank & Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, cast

from slimgrad.errors import InputError


class Kind(IntEnum):
    """What an action does. "Live" is the one state at hand, which stands before some chunk."""

    STORE = 0  # keep the live state, which stands before `chunk`, in `slot`
    LOAD = 1  # make the state in `slot`, which stands before `chunk`, the live one
    ADVANCE = 2  # take the live state through `chunk`, for the next state alone
    REVERSE = 3  # rebuild `chunk` with a graph, and backpropagate through it
    FREE = 4  # forget `slot`
    TAPE = 5  # take the live state through `chunk` and keep its graph, for its REVERSE: no schedule's, see `moves`
    RETRACE = 6  # from after `chunk`, or before it, to before it, without a gradient: no schedule's, see `moves`


class Action(NamedTuple):
    """One action: integers only."""

    kind: Kind
    chunk: int
    slot: int = -1
    whole: bool = False  # STORE: keep also what could be rolled back


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The base of all schedules: where memory lies is said here, and how many graphs are kept; what states, by each.

    `store` is where kept states lie: "device" (beside the state), "host" (main memory), "disk" (a temporary file) or a
    `Path` (a folder for that file). `rows` says the same of the rows of `Growing`; elsewhere than on the device they
    are copied to it chunk by chunk. Anything else is an `InputError`.

    `tape` is how many chunks, the last ones, keep their graphs from the first sweep to the second, where they are then
    not run again. That takes the memory of as many graphs, and saves the time of as many forward passes. What comes
    before the tape is scheduled as if the sequence ended there.
    """

    store: str | Path = "device"
    rows: str | Path = "device"
    tape: int = 0

    rolls_back = False
    """Whether the state after a chunk serves as well as the one before it, for kinds of state that can go back."""

    def __post_init__(self) -> None:
        for name, place in (("store", self.store), ("rows", self.rows)):
            if not isinstance(place, Path) and place not in ("device", "host", "disk"):
                raise InputError(
                    f"{name}={place!r}: expected 'device', 'host', 'disk', or a pathlib.Path of a folder for the file"
                )
        if isinstance(self.tape, bool) or not isinstance(cast(object, self.tape), int) or self.tape < 0:
            raise InputError(f"tape={self.tape!r}: expected a whole number of chunks, 0 or more")

    @abstractmethod
    def actions(self, num_chunks: int) -> Iterator[Action]:
        """The actions, each chunk reversed once, last first."""

    @abstractmethod
    def num_slots(self, num_chunks: int) -> int:
        """How many slots the actions for `num_chunks` chunks use at most."""

    @abstractmethod
    def num_advances(self, num_chunks: int) -> int:
        """How many chunks are advanced for their states alone, the first sweep's N - 1 included."""
