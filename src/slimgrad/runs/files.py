"""Files that are whole or absent, whatever happens while they are written.

A file is written under another name, pushed to the disk and renamed, which the file system does in one piece. So after
a kill or a power cut there is the old content or the new, never a part of it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from slimgrad.errors import StorageError

PARTIAL = ".partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say
_NOT_THERE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # what file systems say of what they cannot do


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` into `path`, replacing what is there. Raises `StorageError`, and leaves what was there."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with storage_errors(path):
        try:
            partial.write_bytes(content)
            push_to_disk(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        push_to_disk(path.parent)


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turn the system's refusal to write into a `StorageError` that names the file."""
    try:
        yield
    except OSError as error:
        advice = "Free some space" if error.errno in _FULL else "Check the folder's rights"
        if not path.parent.exists():
            advice = f"{path.parent} is gone: it was moved, renamed or removed meanwhile. Put it back"
        raise StorageError(f"{path}: expected to write it, got: {error.strerror or error}. {advice}") from error


def push_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk (of folders: where the file system can)."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NOT_THERE):
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's bytes, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
