"""A corpus: a name and its bytes, from a file (memory-mapped) or from what Python carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimgrad.data.pydocs import pydocs
from slimgrad.errors import InputError

PYDOCS = "pydocs"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes with a name.

    Attributes:
        name: what to call it in folders and titles.
        source: where it came from, in words.
        data: uint8 `[bytes]`.
    """

    name: str
    source: str
    data: Tensor


def load_corpus(path: str | Path | None = None) -> Corpus:
    """The bytes of a file, or "pydocs" where `path` is None."""
    if path is None:
        return Corpus(name=PYDOCS, source="pydoc_data.topics of this Python installation", data=pydocs())
    path = Path(path)
    return Corpus(name=path.stem or path.name, source=str(path), data=map_file(path))


def map_file(path: str | Path) -> Tensor:
    """Any file's bytes as uint8 `[bytes]`, memory-mapped: pages are read when touched, and may be dropped again.

    The map is private (copy on write): writing to the tensor never reaches the file, and a read-only file will do.
    The file must keep its length while the tensor lives.

    Raises:
        InputError: no such file, not a regular file, empty, or not readable.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: expected a file, found nothing of that name. Check the path")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "neither a file nor a directory"
        raise InputError(f"{path}: expected a file, found {kind}. Name one file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: expected bytes to read, the file is empty. Name another file")
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="c")
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable file, got: {error.strerror or error}. Check its rights"
        ) from error
    return torch.from_numpy(mapped)
