"""Where kept states lie: beside the state on its device, in host memory, or in a file. One preallocated slab each.

Kept states scattered over the heap cost more than their bytes (fragmentation) and are slow to release, so tensors of
one shape and dtype share one slab with as many rows as the schedule has slots. A slab is allocated when its layout
comes a second time for one leaf of the state; a layout that comes once (the empty window before the first chunk, a
constant) gets a row of its own.

Rows in memory begin at multiples of 64 bytes (512 on an accelerator), as torch's own allocations do: matrix products
take another path through unaligned operands, and give other bits (measured: MKL, float32, operands off by 4 to 12
bytes).

A slab in a file has its space reserved before anything is written: on a disk without room the call stops early. One
thread beside the computation reads ahead and writes behind, in the order in which it was asked; memory holds what is
under way, two copies to be written at most. What is read is checked: see `files`.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from slimgrad.sweep.files import ScratchFile, bytes_of
from slimgrad.sweep.series import FileSeries, MemorySeries, Series

Layout = tuple[int, torch.Size, torch.dtype, torch.device]
T = TypeVar("T")

_BEHIND = 2  # copies that wait to be written


def alignment_bytes(device: torch.device) -> int:
    """At whose multiples torch's own allocations begin, or more."""
    return 64 if device.type == "cpu" else 512


class _Slab:
    """Rows of one layout, in memory: `[rows, ...]`, each aligned."""

    def __init__(self, layout: Layout, rows: Tensor) -> None:
        self.layout, self.rows = layout, rows
        self.count = rows.shape[0]
        self.free = list(range(self.count))
        self.nbytes = rows.untyped_storage().nbytes()

    def write(self, row: int, x: Tensor) -> None:
        self.rows[row].copy_(x, non_blocking=self.rows.is_pinned())  # it comes back on the same stream

    def read(self, row: int) -> Tensor:
        return self.rows[row]

    def whole(self) -> Tensor:
        return self.rows


class _FileSlab:
    """Rows of one layout, in a file: one after the other."""

    def __init__(self, layout: Layout, rows: int, file: ScratchFile) -> None:
        _, self._shape, self._dtype, _ = self.layout = layout
        self._file, self._row_bytes = file, self._shape.numel() * self._dtype.itemsize
        self.count = rows
        self.free = list(range(rows))
        self.nbytes = rows * self._row_bytes
        self._start = file.reserve(self.nbytes)
        self._checksums = array("Q", bytes(8 * rows))

    def write(self, row: int, x: Tensor) -> None:
        self._checksums[row] = self._file.write(bytes_of(x), self._start + row * self._row_bytes)

    def read(self, row: int) -> Tensor:
        x = torch.empty(self._shape, dtype=self._dtype, device="cpu")
        self._file.read(bytes_of(x), self._start + row * self._row_bytes, self._checksums[row])
        return x

    def whole(self) -> Tensor:
        """All rows, mapped: they need not fit into memory."""
        return self._file.mapped(self._start, self.nbytes).view(self._dtype).view(self.count, *self._shape)


class Handle(NamedTuple):
    """Names one kept tensor: its slab, and the row there."""

    slab: int
    row: int


class Store:
    """Keeps copies of tensors.

    Args:
        place: "device", "host", "disk", or the folder for the file that holds the slabs.
        capacity: how many copies of one leaf are kept at the same time, at most.

    Raises:
        StorageError: from any method, where a file fails: also for what was to be written before.
    """

    def __init__(self, place: str | Path, capacity: int = 1) -> None:
        self._place = place
        self._capacity = capacity
        self._slabs: list[_Slab | _FileSlab] = []
        self._file: ScratchFile | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._coming: dict[Handle, Future[Tensor]] = {}
        self._going: deque[Future[None]] = deque()

    @property
    def is_file(self) -> bool:
        """Whether what is kept lies in files."""
        return self._place not in ("device", "host")

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self._slabs)

    def put(self, leaf: int, x: Tensor) -> Handle:
        """Copy `x`, which is leaf number `leaf` of the state, in."""
        layout = (leaf, x.shape, x.dtype, x.device)
        same = [number for number, slab in enumerate(self._slabs) if slab.layout == layout]
        number = next((number for number in same if self._slabs[number].free), None)
        if number is None:
            # once: a row of its own. Again: a slab for all that may still come, and never fewer than one
            rows = 1 if not same else max(1, self._capacity - sum(self._slabs[n].count for n in same))
            number = self._add(rows, layout)
        row = self._slabs[number].free.pop()
        self._write(self._slabs[number], row, x.detach())
        return Handle(number, row)

    def get(self, handle: Handle) -> Tensor:
        """The kept tensor, on its own device; on "device" a view of its row, so do not write to it."""
        slab = self._slabs[handle.slab]
        if isinstance(slab, _Slab):
            row = slab.read(handle.row)
        else:
            self.fetch(handle)
            row = self._coming.pop(handle).result()
        return row.to(slab.layout[-1], non_blocking=True)  # on the caller's stream

    def fetch(self, handle: Handle) -> None:
        """Begin to read a kept tensor that will be wanted soon: from a file, beside the computation."""
        slab = self._slabs[handle.slab]
        if isinstance(slab, _FileSlab) and handle not in self._coming:
            self._coming[handle] = self._beside(slab.read, handle.row)

    def free(self, handle: Handle) -> None:
        """Give the row back."""
        self._coming.pop(handle, None)
        self._slabs[handle.slab].free.append(handle.row)

    def series(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, zeros: bool = False) -> Series:
        """Rows along time, `[batch, time, ...]`, where this store has its place: with nothing in them, or zeros."""
        if self.is_file:
            return FileSeries(shape, dtype, self._opened())  # zeros in any case

        def allocate(shape: Sequence[int]) -> Tensor:
            return self._allocate(math.prod(shape), dtype, device).view(*shape)

        series = MemorySeries(shape, allocate)
        return series.zero() if zeros else series

    def close(self) -> None:
        """Drop every slab, and the file."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._coming.clear()
        self._going.clear()
        self._slabs.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> list[dict[str, Any]]:
        """Every slab, as it is; what lies in a file is read and checked, row by row, and stays there."""
        for slab in self._slabs:
            if isinstance(slab, _FileSlab):
                for row in set(range(slab.count)).difference(slab.free):
                    self._beside(slab.read, row).result()
            elif slab.rows.is_pinned():
                torch.accelerator.synchronize(slab.layout[-1])  # what is on its way to the host is there
        return [{"layout": slab.layout, "rows": slab.whole(), "free": slab.free} for slab in self._slabs]

    def load_state(self, state: list[dict[str, Any]], moved: Mapping[torch.device, torch.device]) -> None:
        """Hold these slabs, at this store's own place.

        Args:
            state: see `state`.
            moved: where tensors of a device are now.
        """
        for saved in state:
            leaf, shape, dtype, device = saved["layout"]
            slab = self._slabs[self._add(saved["rows"].shape[0], (leaf, shape, dtype, moved.get(device, device)))]
            slab.free = list(saved["free"])
            for row in set(range(saved["rows"].shape[0])).difference(slab.free):
                self._write(slab, row, saved["rows"][row])

    def _add(self, rows: int, layout: Layout) -> int:
        """A new slab; its number."""
        _, shape, dtype, device = layout
        if self.is_file:
            slab = _FileSlab(layout, rows, self._opened())
        else:
            multiple = max(1, alignment_bytes(device) // dtype.itemsize)
            row = -(-shape.numel() // multiple) * multiple  # elements from one row to the next
            flat = self._allocate(rows * row, dtype, device).view(rows, row)
            slab = _Slab(layout, flat[:, : shape.numel()].unflatten(1, shape or (1,)).view(rows, *shape))
        self._slabs.append(slab)
        return len(self._slabs) - 1

    def _allocate(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._place == "device":
            return torch.empty(elements, dtype=dtype, device=device)
        return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")

    def _write(self, slab: _Slab | _FileSlab, row: int, x: Tensor) -> None:
        if isinstance(slab, _Slab):
            slab.write(row, x)
            return
        if len(self._going) == _BEHIND:
            self._going.popleft().result()
        copy = torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(x)
        self._going.append(self._beside(slab.write, row, copy))

    def _beside(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have it done in the one thread, after all that was asked before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="slimgrad-store")
        return self._thread.submit(task, *arguments)

    def _opened(self) -> ScratchFile:
        if self._file is None:
            self._file = ScratchFile(self._place if isinstance(self._place, Path) else None)
        return self._file
