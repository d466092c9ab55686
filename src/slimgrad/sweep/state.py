"""The kinds of state a causal model may carry from chunk to chunk.

A state is a pytree (dicts, lists, tuples, named tuples) whose leaves are

| leaf | forward | how it goes back in time |
|---|---|---|
| `PrefixSum` | `S += delta` | `S -= delta`, bit for bit |
| `Growing` | append rows along time | cut off the end |
| a floating tensor | any function | from a kept copy, or recomputed from an earlier one |
| an integer or boolean tensor, a Python value | any function | likewise; no gradient |

The objects here are immutable and hold the direction: a model calls `advance` or `append` once per chunk and gets what
stands before the chunk, and what follows it, whether it runs plainly, in a forward sweep or in a reverse sweep. Outside
a sweep they are ordinary autograd (an addition, a concatenation).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from slimgrad.errors import ModelError


class SumLink(Protocol):
    """What a sweep ties to a `PrefixSum` for the length of one chunk."""

    def advance(self, delta: Tensor) -> tuple[Tensor, PrefixSum]:
        """Take the chunk's contribution; return what stood before it, and what follows."""
        ...


class GrowingLink(Protocol):
    """What a sweep ties to a `Growing` for the length of one chunk."""

    def append(self, rows: Tensor) -> tuple[Tensor, Growing]:
        """Take the chunk's rows; return all rows so far, and what follows."""
        ...

    @property
    def length(self) -> int:
        """Rows before this chunk."""
        ...


class _Spent:
    """Stands behind a state that this chunk has already moved on: to move it twice is an error."""

    length = 0

    def advance(self, delta: Tensor) -> tuple[Tensor, PrefixSum]:
        raise ModelError(
            f"advance was called twice on one PrefixSum within a chunk (second delta: {tuple(delta.shape)}); "
            "expected one call per chunk. Add the contributions first, or hold two sums"
        )

    def append(self, rows: Tensor) -> tuple[Tensor, Growing]:
        raise ModelError(
            f"append was called twice on one Growing within a chunk (second rows: {tuple(rows.shape)}); "
            "expected one call per chunk. Concatenate the rows first, or hold two Growing states"
        )


SPENT = _Spent()


def _refuse_half_a_number(call: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.is_complex() and not dtype.is_complex:
        raise ModelError(
            f"{call} was given {x.dtype} for a state of {dtype}, which would drop the imaginary part. "
            f"Begin with a state of {x.dtype}, or pass x.real"
        )


class PrefixSum:
    """A running sum over time: the state of linear attention, and of anything that only ever adds.

    `before, following = state.advance(delta)` gives the sum before the chunk (a tensor) and the state after it.

    Args:
        value: the sum so far, any shape, of floating, complex or integer numbers, usually zeros. Integer sums are exact
            counters (positions). Booleans are refused: their sum is an "or", which cannot be subtracted.
    """

    __slots__ = ("_link", "_value")

    def __init__(self, value: Tensor, *, _link: SumLink | None = None) -> None:
        if value.dtype == torch.bool:
            raise ModelError(
                'PrefixSum expects numbers, got torch.bool: a sum of booleans is an "or", which cannot be subtracted '
                "again. Sum integers (PrefixSum of torch.int64 zeros; booleans may be added to it) and ask for > 0"
            )
        self._value = value
        self._link = _link

    def advance(self, delta: Tensor) -> tuple[Tensor, PrefixSum]:
        """Add one chunk's contribution.

        Args:
            delta: the chunk's own contribution, of the sum's shape (or one that broadcasts to it).

        Returns:
            The sum before the chunk, and the state that follows. Gradients flow through both.
        """
        _refuse_half_a_number("PrefixSum.advance", delta, self._value.dtype)
        if delta.shape != self._value.shape:
            delta = delta.expand(self._value.shape)
        if self._link is not None:
            return self._link.advance(delta)
        return self._value, PrefixSum(self._value + delta.to(self._value.dtype))

    @property
    def value(self) -> Tensor:
        """The sum. Within a sweep, only of the state that `advance` returned: the one before comes from `advance`."""
        if self._link is not None and self._link is not SPENT:
            raise ModelError(
                "the value of a PrefixSum was read before advance within a sweep, where it is not known yet; "
                "take it from `before, following = state.advance(delta)` (delta may be zeros)"
            )
        return self._value

    @property
    def shape(self) -> torch.Size:
        """Shape of the sum, known at any time."""
        return self._value.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sum, known at any time."""
        return self._value.dtype

    @property
    def device(self) -> torch.device:
        """Device of the sum, known at any time."""
        return self._value.device

    def __repr__(self) -> str:
        return f"PrefixSum(shape={tuple(self.shape)}, dtype={self.dtype})"


class Growing:
    """Rows that pile up along time: the keys or the values of a cache.

    `rows, following = state.append(new_rows)` gives all rows so far, the new ones last, and the state after the chunk.
    Memory in a sweep: one buffer and one gradient buffer, linear in the sequence. That is what full attention needs.

    Args:
        value: the rows so far, `[batch, time, ...]`; usually `time` = 0.
    """

    __slots__ = ("_link", "_value")

    def __init__(self, value: Tensor, *, _link: GrowingLink | None = None) -> None:
        if value.dim() < 2:
            raise ModelError(f"Growing expects [batch, time, ...], got shape {tuple(value.shape)}")
        self._value = value
        self._link = _link

    def append(self, rows: Tensor) -> tuple[Tensor, Growing]:
        """Append one chunk's rows.

        Args:
            rows: `[batch, new, ...]`, the other axes as in the rows so far.

        Returns:
            All rows, `[batch, so far + new, ...]`, and the state that follows. Gradients flow through both.
        """
        expected, got = self._value.shape, rows.shape
        if expected[:1] + expected[2:] != got[:1] + got[2:]:
            raise ModelError(
                f"Growing.append expects rows [batch, new, ...] that match {list(expected)} except along axis 1, "
                f"got {list(got)}"
            )
        _refuse_half_a_number("Growing.append", rows, self._value.dtype)
        if self._link is not None:
            return self._link.append(rows)
        value = torch.cat([self._value, rows.to(self._value.dtype)], dim=1)
        return value, Growing(value)

    @property
    def value(self) -> Tensor:
        """All rows. Within a sweep, only of the state that `append` returned."""
        if self._link is not None and self._link is not SPENT:
            raise ModelError(
                "the value of a Growing was read before append within a sweep, where it is not known yet; "
                "take it from `rows, following = state.append(new_rows)`"
            )
        return self._value

    @property
    def length(self) -> int:
        """Rows so far, known at any time: the position of the next one."""
        return self._value.shape[1] if self._link is None or self._link is SPENT else self._link.length

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows, known at any time."""
        return self._value.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows, known at any time."""
        return self._value.device

    def __repr__(self) -> str:
        return f"Growing(length={self.length}, row_shape={tuple(self._value.shape[2:])}, dtype={self.dtype})"
