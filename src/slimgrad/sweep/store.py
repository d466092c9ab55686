"""Where kept states lie: beside the state on its device, in host memory, or in a file. One preallocated slab each.

Kept states scattered over the heap cost more than their bytes (fragmentation) and are slow to release, so tensors of
one shape and dtype share one slab with as many rows as the schedule has slots. A slab is allocated when its layout
comes a second time for one leaf of the state; a layout that comes once (the empty window before the first chunk, a
constant) gets a row of its own.

A slab in a file has its space reserved before it is mapped: on a disk without room the call stops with a
`StorageError`. A file with holes would be mapped all the same, and the first write that finds no room kills the process
(SIGBUS).

Rows begin at multiples of 64 bytes (512 on an accelerator), as torch's own allocations do: matrix products take another
path through unaligned operands, and give other bits (measured: MKL, float32, operands off by 4 to 12 bytes).
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgrad.errors import StorageError

Layout = tuple[int, torch.Size, torch.dtype, torch.device]

_ZEROS = bytes(1 << 20)


def alignment_bytes(device: torch.device) -> int:
    """At whose multiples torch's own allocations begin, or more."""
    return 64 if device.type == "cpu" else 512


@dataclass
class _Slab:
    """Rows of one layout: `[rows, ...]`, each aligned."""

    layout: Layout
    rows: Tensor
    free: list[int] = field(default_factory=list[int])


class Handle(NamedTuple):
    """Names one kept tensor: its slab, and the row there."""

    slab: int
    row: int


class Store:
    """Keeps copies of tensors.

    Args:
        place: "device", "host", "disk", or the folder for the file that holds the slabs.
        capacity: how many copies of one leaf are kept at the same time, at most.
    """

    def __init__(self, place: str | Path, capacity: int = 1) -> None:
        self._place = place
        self._capacity = capacity
        self._slabs: list[_Slab] = []
        self._coming: dict[Handle, Future[Tensor]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._folder: Path | None = None
        self._files = 0
        self._remove_folder: weakref.finalize[..., Any] | None = (
            None  # runs at the latest when nobody holds the store any more
        )

    @property
    def is_file(self) -> bool:
        """Whether what is kept lies in files."""
        return self._place not in ("device", "host")

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.rows.untyped_storage().nbytes() for slab in self._slabs)

    def put(self, leaf: int, x: Tensor) -> Handle:
        """Copy `x`, which is leaf number `leaf` of the state, in."""
        layout = (leaf, x.shape, x.dtype, x.device)
        same = [number for number, slab in enumerate(self._slabs) if slab.layout == layout]
        number = next((number for number in same if self._slabs[number].free), None)
        if number is None:
            # once: a row of its own. Again: a slab for all that may still come, and never fewer than one
            rows = 1 if not same else max(1, self._capacity - sum(self._slabs[n].rows.shape[0] for n in same))
            self._slabs.append(_Slab(layout, self._rows(rows, layout), list(range(rows))))
            number = len(self._slabs) - 1
        slab = self._slabs[number]
        row = slab.free.pop()
        slab.rows[row].copy_(x.detach(), non_blocking=slab.rows.is_pinned())  # it comes back on the same stream
        return Handle(number, row)

    def get(self, handle: Handle) -> Tensor:
        """The kept tensor, on its own device; on "device" a view of its row, so do not write to it."""
        coming, slab = self._coming.pop(handle, None), self._slabs[handle.slab]
        row = slab.rows[handle.row] if coming is None else coming.result()
        return row.to(slab.layout[-1], non_blocking=True)  # on the caller's stream

    def fetch(self, handle: Handle) -> None:
        """Begin to read a kept tensor that will be wanted soon: from a file, beside the computation."""
        if not self.is_file or handle in self._coming:
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="slimgrad-store")
        self._coming[handle] = self._reader.submit(self._slabs[handle.slab].rows[handle.row].clone)

    def free(self, handle: Handle) -> None:
        """Give the row back."""
        self._coming.pop(handle, None)
        self._slabs[handle.slab].free.append(handle.row)

    def space(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with nothing in it, where this store has its place. Elsewhere than on `device` it stays there."""
        return self._allocate(math.prod(shape), dtype, device).view(shape)

    def close(self) -> None:
        """Drop every slab, and the files."""
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None
        self._coming.clear()
        self._slabs.clear()
        if self._remove_folder is not None:
            self._remove_folder()
            self._folder = None

    def state(self) -> list[dict[str, Any]]:
        """Every slab, as it is."""
        for device in {slab.layout[-1] for slab in self._slabs if slab.rows.is_pinned()}:
            torch.accelerator.synchronize(device)  # what is on its way to the host is there
        return [{"layout": slab.layout, "rows": slab.rows, "free": slab.free} for slab in self._slabs]

    def load_state(self, state: list[dict[str, Any]], moved: Mapping[torch.device, torch.device]) -> None:
        """Hold these slabs, at this store's own place.

        Args:
            state: see `state`.
            moved: where tensors of a device are now.
        """
        for saved in state:
            leaf, shape, dtype, device = saved["layout"]
            device = moved.get(device, device)
            rows = self._rows(saved["rows"].shape[0], (leaf, shape, dtype, device))
            rows.copy_(saved["rows"])
            self._slabs.append(_Slab((leaf, shape, dtype, device), rows, list(saved["free"])))

    def _rows(self, rows: int, layout: Layout) -> Tensor:
        _, shape, dtype, device = layout
        multiple = max(1, alignment_bytes(device) // dtype.itemsize)
        row = -(-shape.numel() // multiple) * multiple  # elements from one row to the next
        flat = self._allocate(rows * row, dtype, device).view(rows, row)
        return flat[:, : shape.numel()].unflatten(1, shape or (1,)).view(rows, *shape)

    def _allocate(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._place == "device":
            return torch.empty(elements, dtype=dtype, device=device)
        if self._place == "host" or elements == 0:
            return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        if self._folder is None:
            self._folder = _make_folder(self._place if isinstance(self._place, Path) else None)
            # a slab may still be mapped when the folder goes, which Windows forbids: leave the file then
            self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{self._files}.slab"
        self._files += 1
        _reserve(path, elements * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)


def _make_folder(parent: Path | None) -> Path:
    """A new folder within `parent`, or within the system's own for temporary files."""
    try:
        return Path(tempfile.mkdtemp(prefix="slimgrad-", dir=parent))
    except OSError as error:
        raise StorageError(
            f"{parent or 'the temporary folder'}: expected a folder that files of kept states can be written to, got: "
            f"{error.strerror or error}. Make it, or name another one: store=pathlib.Path(...)"
        ) from error


def _reserve(path: Path, num_bytes: int) -> None:
    """Make a file of `num_bytes` that the disk has room for, or no file."""
    try:
        with path.open("xb") as file:
            if not _allocates(file.fileno(), num_bytes):
                for start in range(0, num_bytes, len(_ZEROS)):
                    file.write(_ZEROS[: num_bytes - start])
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: expected to reserve {num_bytes:,} bytes for kept states, got: {error.strerror or error}. Name a "
            "folder with more room, store=pathlib.Path(...), or a schedule that keeps fewer states, as Binomial(8) does"
        ) from error


def _allocates(descriptor: int, num_bytes: int) -> bool:
    """Reserve without writing; False where the system or the file system has no such call."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True
