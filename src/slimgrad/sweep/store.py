"""Where kept states lie: beside the state on its device, in host memory, or in a file. One preallocated slab each.

Kept states scattered over the heap cost more than their bytes (fragmentation) and are slow to release, so tensors of
one shape and dtype share one slab with as many rows as the schedule has slots. A slab is allocated when its layout
comes a second time for one leaf of the state; a layout that comes once (the empty window before the first chunk, a
constant) gets a row of its own.

A slab in a file has its space reserved before it is mapped: on a disk without room the call stops with a
`StorageError`. A file with holes would be mapped all the same, and the first write that finds no room kills the process
(SIGBUS).

Rows begin at multiples of 64 bytes, as torch's own allocations do: matrix products take another path through unaligned
operands, and give other bits (measured: MKL, float32, operands off by 4 to 12 bytes).
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import StorageError

Layout = tuple[int, torch.Size, torch.dtype, torch.device]

_ALIGNMENT_BYTES = 64
_ZEROS = bytes(1 << 20)


@dataclass
class _Slab:
    """Rows of one layout: `[rows, ...]`, each aligned."""

    rows: Tensor
    free: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, eq=False)
class Handle:
    """Names one kept tensor."""

    slab: _Slab
    row: int
    device: torch.device


class Store:
    """Keeps copies of tensors.

    Args:
        place: "device", "host", "disk", or the folder for the file that holds the slabs.
        capacity: how many copies of one leaf are kept at the same time, at most.
    """

    def __init__(self, place: str | Path, capacity: int) -> None:
        self._place = place
        self._capacity = capacity
        self._slabs: dict[Layout, list[_Slab]] = {}
        self._folder: Path | None = None
        self._remove_folder: weakref.finalize[..., Any] | None = (
            None  # runs at the latest when nobody holds the store any more
        )
        self.nbytes = 0

    def put(self, leaf: int, x: Tensor) -> Handle:
        """Copy `x`, which is leaf number `leaf` of the state, in."""
        layout = (leaf, x.shape, x.dtype, x.device)
        slabs = self._slabs.setdefault(layout, [])
        if not any(slab.free for slab in slabs):
            # once: a row of its own. Again: a slab for all that may still come, and never fewer than one
            rows = 1 if not slabs else max(1, self._capacity - sum(slab.rows.shape[0] for slab in slabs))
            slab = _Slab(self._allocate(rows, x), list(range(rows)))
            self.nbytes += rows * _row_elements(x) * x.element_size()
            slabs.append(slab)
        slab = next(slab for slab in slabs if slab.free)
        row = slab.free.pop()
        slab.rows[row].copy_(x.detach())
        return Handle(slab, row, x.device)

    def get(self, handle: Handle) -> Tensor:
        """The kept tensor, on its own device; on "device" a view of its row, so do not write to it."""
        return handle.slab.rows[handle.row].to(handle.device)

    def free(self, handle: Handle) -> None:
        """Give the row back."""
        handle.slab.free.append(handle.row)

    def close(self) -> None:
        """Drop every slab, and the files."""
        self._slabs.clear()
        self.nbytes = 0
        if self._remove_folder is not None:
            self._remove_folder()
            self._folder = None

    def _allocate(self, rows: int, like: Tensor) -> Tensor:
        row = _row_elements(like)
        if self._place == "device":
            flat = torch.empty(rows * row, dtype=like.dtype, device=like.device)
        elif self._place == "host" or row == 0:
            flat = torch.empty(rows * row, dtype=like.dtype, pin_memory=like.device.type == "cuda")
        else:
            if self._folder is None:
                self._folder = _make_folder(self._place if isinstance(self._place, Path) else None)
                # a slab may still be mapped when the folder goes, which Windows forbids: leave the file then
                self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            path = self._folder / f"{sum(map(len, self._slabs.values()))}-{rows}.slab"
            _reserve(path, rows * row * like.element_size())
            flat = torch.from_file(str(path), shared=True, size=rows * row, dtype=like.dtype)
        return flat.view(rows, row)[:, : like.numel()].unflatten(1, like.shape or (1,)).view(rows, *like.shape)


def _row_elements(like: Tensor) -> int:
    """Elements from one row to the next."""
    multiple = max(1, _ALIGNMENT_BYTES // like.element_size())
    return -(-like.numel() // multiple) * multiple


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
