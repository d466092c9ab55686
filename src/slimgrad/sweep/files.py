"""A file that goes with its process: space is reserved before it is used, and what is read back is checked.

The file has no name: the system makes it so, or it is unlinked as soon as it is open (on Windows the system deletes it
when it is closed, also by a kill). So nothing is left behind, however the process ends, and nothing needs to be looked
for. `df` shows what it takes, `du` does not.

It is read and written, not mapped: a page of a map counts as this process' memory, and one that the disk cannot give
kills the process (SIGBUS). What comes back is compared with a checksum of what was written, which is in memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
import zlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slimgrad.errors import StorageError

_ZEROS = bytes(1 << 20)


def bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    assert x.device.type == "cpu"
    return memoryview(cast(Any, x.view(-1).view(torch.uint8).numpy()))


class ScratchFile:
    """A file without a name. Not for two threads at once.

    Args:
        folder: on whose disk it lies; None is the system's own for temporary files.

    Raises:
        StorageError: it cannot be made there; from the methods: the disk is full, cannot be written to or read from, or
            gives other bytes than were written. After a write that failed, all that follows fails.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._folder = folder or Path(tempfile.gettempdir())
            self._file: Any = tempfile.TemporaryFile(buffering=0, prefix="slimgrad-", dir=folder)  # noqa: SIM115
        except OSError as error:
            raise StorageError(
                f"{folder or 'the temporary folder'}: expected a folder that files of kept states can be written to, "
                f"got: {error.strerror or error}. Make it, or name another one: store=pathlib.Path(...)"
            ) from error
        self._end = 0
        self._failure = ""
        self.close = weakref.finalize(self, self._file.close)  # at the latest when nobody holds it any more

    def reserve(self, num_bytes: int) -> int:
        """Have room for so many bytes that writing them cannot fill the disk. Returns where they begin."""
        start = self._end
        try:
            if not _allocates(self._file.fileno(), start, num_bytes):
                for done in range(0, num_bytes, len(_ZEROS)):
                    self._put(memoryview(_ZEROS)[: num_bytes - done], start + done)
        except OSError as error:
            raise StorageError(
                f"{self._folder}: expected to reserve {num_bytes:,} bytes for kept states, got: "
                f"{error.strerror or error}. Name a folder with more room, store=pathlib.Path(...), or a schedule that "
                "keeps fewer states, as Binomial(8) does"
            ) from error
        whole = mmap.ALLOCATIONGRANULARITY  # so that it can be mapped
        self._end += -(-num_bytes // whole) * whole
        return start

    def write(self, data: memoryview, start: int) -> int:
        """Put bytes where room was reserved for them. Returns their checksum, which `read` wants."""
        self._require_whole()
        try:
            self._put(data, start)
        except OSError as error:
            self._failure = (
                f"{self._folder}: expected to write {len(data):,} bytes of kept states to a file (without a name), "
                f"got: {error.strerror or error}. Look at the disk, or name another folder: store=pathlib.Path(...)"
            )
            raise StorageError(self._failure) from error
        return _checksum(data)

    def read(self, into: memoryview, start: int, checksum: int) -> None:
        """Get bytes back, as they were written in one piece."""
        self._require_whole()
        done = 0
        try:
            while done < len(into) and (count := self._get(into[done:], start + done)):
                done += count
        except OSError as error:
            raise self._damaged(f"got: {error.strerror or error}", len(into)) from error
        if done < len(into):
            raise self._damaged(f"got {done:,}: it was cut off", len(into))
        if _checksum(into) != checksum:
            raise self._damaged("read back with other bytes than were written", len(into))

    def fetch(self, start: int, num_bytes: int) -> None:
        """Have the system read bytes ahead, into its own cache, where it does that (Linux)."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, num_bytes, os.POSIX_FADV_WILLNEED)

    def mapped(self, start: int, num_bytes: int) -> Tensor:
        """Bytes that were reserved, as a tensor which need not be in memory: to be written to another file."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        self._require_whole()
        if os.fstat(self._file.fileno()).st_size < start + num_bytes:
            raise self._damaged("it was cut off", num_bytes)
        pages = mmap.mmap(self._file.fileno(), num_bytes, access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def _require_whole(self) -> None:
        if self._failure:
            raise StorageError(self._failure)

    def _damaged(self, how: str, num_bytes: int) -> StorageError:
        return StorageError(
            f"{self._folder}: a file (without a name) of kept states: expected {num_bytes:,} bytes, {how}. What it "
            "held is lost, and this gradient with it; every .grad is as it was. Look at the disk, or name another "
            "folder: store=pathlib.Path(...)"
        )

    def _put(self, data: memoryview, start: int) -> None:
        while len(data):
            if hasattr(os, "pwrite"):
                count = os.pwrite(self._file.fileno(), data, start)
            else:  # Windows
                self._file.seek(start)
                count = self._file.write(data)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data, start = data[count:], start + count

    def _get(self, into: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], start)
        self._file.seek(start)
        return self._file.readinto(into)


def _checksum(data: memoryview) -> int:
    """64 bits: of CRC-32, to which no change of one bit, nor of 32 beside each other, is lost, and of Adler-32."""
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def _allocates(descriptor: int, start: int, num_bytes: int) -> bool:
    """Reserve without writing; False where the system or the file system has no such call."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, start, num_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True
