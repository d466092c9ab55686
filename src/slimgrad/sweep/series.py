"""Rows along time, `[batch, time, ...]`, in memory or in a file: what keys and values, and their gradients, lie in.

In a file they lie in blocks of some rows of the whole batch, each checked against what was written: see `files`. What
is asked for is read, and no more is held; what will be, the system reads ahead into its own cache, which needs neither
a thread nor memory of this process. A block that nothing was put into is zero, and is not read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgrad.sweep.files import ScratchFile, bytes_of

_BLOCK_BYTES = 1 << 18
_ALIGNED = 64  # rows: a multiple of them is one of 64 bytes, whatever the row


class Series(ABC):
    """Rows along time."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many rows there is room for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What they take."""

    @abstractmethod
    def grow(self, capacity: int, kept: int) -> None:
        """Have room for so many rows; the first `kept` are needed."""

    @abstractmethod
    def read(self, first: int, stop: int, device: torch.device) -> Tensor:
        """Some rows, `[batch, stop - first, ...]`: where they lie on the device already, they themselves."""

    @abstractmethod
    def write(self, start: int, rows: Tensor) -> None:
        """Put rows in, `[batch, new, ...]`."""

    @abstractmethod
    def add(self, start: int, rows: Tensor) -> None:
        """Add rows to those that are there."""

    def fetch(self, first: int, stop: int) -> None:  # noqa: B027
        """These rows will be read soon."""

    @abstractmethod
    def state(self, length: int) -> Any:
        """The first rows for a file: one tensor, or several to be put beside each other along time. Not copied."""

    def load_state(self, state: Any) -> None:
        """Hold these rows."""
        pieces: Sequence[Tensor] = [state] if isinstance(state, Tensor) else state
        self.grow(sum(piece.shape[1] for piece in pieces), 0)
        start = 0
        for piece in pieces:
            self.write(start, piece)
            start += piece.shape[1]


class MemorySeries(Series):
    """Rows in one tensor.

    Args:
        shape: `[batch, capacity, ...]`.
        allocate: makes a tensor of a shape.
    """

    def __init__(self, shape: Sequence[int], allocate: Callable[[Sequence[int]], Tensor]) -> None:
        self._allocate, self._rows = allocate, allocate(shape)

    @property
    def capacity(self) -> int:
        return self._rows.shape[1]

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def grow(self, capacity: int, kept: int) -> None:
        wider = self._allocate((self._rows.shape[0], capacity, *self._rows.shape[2:]))
        wider[:, :kept] = self._rows[:, :kept]
        self._rows = wider

    def read(self, first: int, stop: int, device: torch.device) -> Tensor:
        return self._rows[:, first:stop].to(device, non_blocking=True)

    def write(self, start: int, rows: Tensor) -> None:
        self._rows[:, start : start + rows.shape[1]] = rows

    def add(self, start: int, rows: Tensor) -> None:
        self._rows[:, start : start + rows.shape[1]] += rows.to(self._rows.device)

    def zero(self) -> MemorySeries:
        """Put zeros in."""
        self._rows.zero_()
        return self

    def state(self, length: int) -> Tensor:
        # whole: they may be large, and rows begin where they began
        self._rows[:, length:] = 0
        return self._rows


class _Part(NamedTuple):
    """What a block and a range of rows have in common: rows of the block, and rows of the range."""

    block: int
    here: slice
    there: slice


class FileSeries(Series):
    """Rows in a file.

    Args:
        shape: `[batch, capacity, ...]`.
        dtype: of the rows.
        file: which may hold other things as well.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, file: ScratchFile) -> None:
        (self._batch, capacity, *row), self._dtype, self._file = shape, dtype, file
        row_bytes = max(1, self._batch * torch.Size(row).numel() * dtype.itemsize)
        self._row = torch.Size(row)
        self._length = max(1, min(_BLOCK_BYTES // row_bytes, 1 << 20))  # of a block
        self._block_bytes = self._length * self._batch * self._row.numel() * dtype.itemsize
        self._regions: list[tuple[int, int]] = []  # where blocks lie beside each other, and how many
        self._starts: list[int] = []
        self._checksums: list[int | None] = []
        self.grow(capacity, 0)

    @property
    def capacity(self) -> int:
        return self._length * len(self._starts)

    @property
    def nbytes(self) -> int:
        return self._block_bytes * len(self._starts)

    def grow(self, capacity: int, kept: int) -> None:
        count = -(-capacity // self._length) - len(self._starts)
        if count > 0:
            start = self._file.reserve(count * self._block_bytes)
            self._regions.append((start, count))
            self._starts += [start + k * self._block_bytes for k in range(count)]
            self._checksums += [None] * count

    def read(self, first: int, stop: int, device: torch.device) -> Tensor:
        # begun as far from a multiple of 64 bytes as in one buffer, and each of the batch as well
        skipped, length = first % _ALIGNED, stop - first
        room = -(-(skipped + length) // _ALIGNED) * _ALIGNED
        rows = torch.empty((self._batch, room, *self._row), dtype=self._dtype, device="cpu").narrow(1, skipped, length)
        for part in self._parts(first, stop):
            rows[:, part.there] = self._block(part.block)[:, part.here]
        return rows.to(device)

    def write(self, start: int, rows: Tensor) -> None:
        for part in self._parts(start, start + rows.shape[1]):
            block = self._block(part.block)
            block[:, part.here] = rows[:, part.there]
            self._put(part.block, block)

    def add(self, start: int, rows: Tensor) -> None:
        rows = rows.to("cpu")
        for part in self._parts(start, start + rows.shape[1]):
            block = self._block(part.block)
            block[:, part.here] += rows[:, part.there]
            self._put(part.block, block)

    def fetch(self, first: int, stop: int) -> None:
        for part in self._parts(first, stop):
            if self._checksums[part.block] is not None:
                self._file.fetch(self._starts[part.block], self._block_bytes)

    def state(self, length: int) -> list[Tensor]:
        for block in range(len(self._starts)):
            self._block(block)  # raises if it is not what it was
        shape = (self._batch, self._length, *self._row)
        regions = [self._file.mapped(start, count * self._block_bytes) for start, count in self._regions]
        blocks = [x.view(self._dtype).view(-1, *shape).unbind() for x in regions]
        return [block for region in blocks for block in region]

    def _parts(self, first: int, stop: int) -> Iterator[_Part]:
        for block in range(first // self._length, -(-stop // self._length)):
            start = block * self._length
            begin, end = max(first, start), min(stop, start + self._length)
            yield _Part(block, slice(begin - start, end - start), slice(begin - first, end - first))

    def _block(self, block: int) -> Tensor:
        """A block's rows, `[batch, ...]`; those that were never written are zeros."""
        shape, checksum = (self._batch, self._length, *self._row), self._checksums[block]
        if checksum is None:
            return torch.zeros(shape, dtype=self._dtype, device="cpu")
        rows = torch.empty(shape, dtype=self._dtype, device="cpu")
        self._file.read(bytes_of(rows), self._starts[block], checksum)
        return rows

    def _put(self, block: int, rows: Tensor) -> None:
        self._checksums[block] = self._file.write(bytes_of(rows), self._starts[block])
