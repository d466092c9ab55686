"""Numbers that were noted along the time axis, by position: 16 bytes each."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Any

import torch


class Record:
    """Numbers by position, noted from left to right and found again from anywhere."""

    def __init__(self) -> None:
        self._positions, self._numbers = array("q"), array("q")

    @property
    def first(self) -> int | None:
        """The first number."""
        return self._numbers[0] if self._numbers else None

    def put(self, position: int, number: int) -> None:
        """Note a number, where none has been noted at this position or to the right of it."""
        if not self._positions or position > self._positions[-1]:
            self._positions.append(position)
            self._numbers.append(number)

    def at(self, position: int) -> int | None:
        """The number that was noted at this position."""
        place = bisect_left(self._positions, position)
        found = place < len(self._positions) and self._positions[place] == position
        return self._numbers[place] if found else None

    def forget_after(self, position: int) -> None:
        """Drop what stands to the right of `position`."""
        while self._positions and self._positions[-1] > position:
            self._positions.pop()
            self._numbers.pop()

    def state(self) -> dict[str, Any]:
        """As tensors."""
        return {
            "positions": torch.tensor(self._positions, dtype=torch.int64, device="cpu"),
            "numbers": torch.tensor(self._numbers, dtype=torch.int64, device="cpu"),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._positions = array("q", state["positions"].tolist())
        self._numbers = array("q", state["numbers"].tolist())
