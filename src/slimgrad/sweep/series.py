"""Rows along time, `[batch, time, ...]`, in memory or in a file: what keys and values, and their gradients, lie in.

In a file they lie in blocks of some rows of the whole batch, each checked against what was written: see `files`. What
is asked for is read, and no more is held; what will be, the system reads ahead into its own cache, which needs neither
a thread nor memory of this process. A block that nothing was put into is zero, and is not read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimgrad.sweep.files import ScratchFile, bytes_of

_BLOCK_BYTES = 1 << 18
_ALIGNED = 64  # rows: a multiple of them is one of 64 bytes, whatever the row


class Rows(NamedTuple):
    """Rows of a series as they go to a file, or come from one.

    Attributes:
        shape: `[batch, capacity, ...]` of the series.
        dtype: of the rows.
        length: how many of the first there are.
        steady: whether those that went to a file before are as they were then.
        pieces: gives the rows from one on, `[batch, some, ...]`, one after the other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    length: int
    steady: bool
    pieces: Callable[[int], Iterator[Tensor]]


class Series(ABC):
    """Rows along time."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`[batch, capacity, ...]`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the rows."""

    @property
    def capacity(self) -> int:
        """How many rows there is room for."""
        return self.shape[1]

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

    def lend(self, first: int, stop: int, device: torch.device) -> Tensor:
        """The same for somebody else, who must not write to them: autograd sees neither a view nor our own writes."""
        return self.read(first, stop, device).detach()

    @property
    def is_spoilt(self) -> bool:
        """Whether somebody wrote to what was lent, and so to the rows here."""
        return False

    @abstractmethod
    def write(self, start: int, rows: Tensor) -> None:
        """Put rows in, `[batch, new, ...]`."""

    @abstractmethod
    def add(self, start: int, rows: Tensor) -> None:
        """Add rows to those that are there."""

    def fetch(self, first: int, stop: int) -> None:  # noqa: B027
        """These rows will be read soon."""

    @abstractmethod
    def pieces(self, first: int, stop: int) -> Iterator[Tensor]:
        """Some rows for a file, `[batch, some, ...]`, one after the other. Not copied."""

    def state(self, length: int, *, steady: bool = False) -> Rows:
        """The first rows for a file. `steady`: see `Rows`."""

        def pieces(first: int) -> Iterator[Tensor]:
            return self.pieces(first, length)

        return Rows(self.shape, self.dtype, length, steady, pieces)

    def load_state(self, state: Rows) -> None:
        """Hold these rows, in as much room as they had: where rows begin decides about bits."""
        self.grow(state.shape[1], 0)
        start = 0
        for piece in state.pieces(0):
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
        # the same memory under a version counter of its own: `write` does not count there, whoever borrowed does
        self._lent: Tensor | None = None
        self._version = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._rows.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def grow(self, capacity: int, kept: int) -> None:
        wider = self._allocate((self._rows.shape[0], capacity, *self._rows.shape[2:]))
        wider[:, :kept] = self._rows[:, :kept]
        self._rows, self._lent = wider, None

    def read(self, first: int, stop: int, device: torch.device) -> Tensor:
        return self._rows[:, first:stop].to(device, non_blocking=True)

    def lend(self, first: int, stop: int, device: torch.device) -> Tensor:
        if device != self._rows.device:
            return super().lend(first, stop, device)
        if self._lent is None:
            rows = self._rows
            with torch.inference_mode(False):  # of inference tensors torch counts no versions
                self._lent = torch.empty(0, dtype=rows.dtype, device=rows.device).set_(
                    rows.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride()
                )
            self._version = self._lent._version
        return self._lent[:, first:stop].detach()

    @property
    def is_spoilt(self) -> bool:
        return self._lent is not None and self._lent._version != self._version

    def write(self, start: int, rows: Tensor) -> None:
        self._rows[:, start : start + rows.shape[1]] = rows

    def add(self, start: int, rows: Tensor) -> None:
        self._rows[:, start : start + rows.shape[1]] += rows.to(self._rows.device)

    def zero(self) -> MemorySeries:
        """Put zeros in."""
        self._rows.zero_()
        return self

    def pieces(self, first: int, stop: int) -> Iterator[Tensor]:
        if self._rows.is_pinned():
            torch.accelerator.synchronize()  # what is on its way to the host is there
        some = max(1, _BLOCK_BYTES * 64 // max(1, self._rows[:, :1].nbytes))
        for start in range(first, stop, some):
            yield self._rows[:, start : min(start + some, stop)]


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
        self._starts: list[int] = []
        self._checksums: list[int | None] = []
        self.grow(capacity, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._batch, self._length * len(self._starts), *self._row

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def nbytes(self) -> int:
        return self._block_bytes * len(self._starts)

    def grow(self, capacity: int, kept: int) -> None:
        count = -(-capacity // self._length) - len(self._starts)
        if count > 0:
            start = self._file.reserve(count * self._block_bytes)
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

    def pieces(self, first: int, stop: int) -> Iterator[Tensor]:
        for part in self._parts(first, stop):
            yield self._block(part.block)[:, part.here]

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
