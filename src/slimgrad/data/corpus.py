"""A corpus: a name and its bytes, from files (read as they are used), from the network, or from what Python carries."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slimgrad.data.documents import Documents, FileBytes
from slimgrad.data.fetching import fetch
from slimgrad.data.options import AS_BYTES, END, SPREAD, Reading
from slimgrad.data.python_docs import pydocs
from slimgrad.data.reading import read_documents
from slimgrad.errors import InputError

logger = logging.getLogger("slimgrad")
PYDOCS, ENWIK8, PTB, TINYSHAKESPEARE = "pydocs", "enwik8", "ptb", "tinyshakespeare"
KNOWN = (PYDOCS, ENWIK8, PTB, TINYSHAKESPEARE)
_ENWIK8_TRAINING, _ENWIK8_VALIDATION = 90_000_000, 5_000_000  # the usual split; the last five million are for tests
_PLACES, _LEAST = 8, 1024  # stretches of a text that are held out, and bytes of each, where there are so many


class Split(NamedTuple):
    """Training bytes and validation bytes, no byte in both."""

    train: Documents
    validation: Documents


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes with a name.

    Attributes:
        name: what to call it in folders and titles.
        source: where it came from, in words.
        text: what to train on; where `validation` is None, some of it is for validation.
        validation: a validation part of its own, where the corpus has one.
    """

    name: str
    source: str
    text: Documents
    validation: Documents | None = None

    def split(self, *, validation_bytes: int, window: int, held_out: str = SPREAD) -> Split:
        """Training and validation.

        Args:
            validation_bytes: from the start of the validation part, or else held out of the text; at least 2.
            window: bytes that the training part must have at least.
            held_out: where the text has no validation part: "spread" (eight stretches from all over it, fewer where
                they would have less than 1,024 bytes: the ends of many texts are not like the rest), "end" (its last
                bytes), or a share such as "0.05" (that of each document, at its end; `validation_bytes` says nothing).

        Raises:
            InputError: the text is too short for both.
        """
        if validation_bytes < 2:
            raise InputError(
                f"validation_bytes={validation_bytes}: expected at least 2 bytes, one to read and one to predict"
            )
        if self.validation is not None and len(self.text) >= window:
            few = min(validation_bytes, len(self.validation))
            return Split(self.text, self.validation.cut(few)[0] if few < len(self.validation) else self.validation)
        share = as_share(held_out)
        if share is not None:
            validation_bytes = self.bytes_of_share(share)
        if len(self.text) < window + validation_bytes:
            raise InputError(
                f"{self.name}: expected at least {window + validation_bytes:,} bytes (one window of {window:,} and "
                f"{validation_bytes:,} for validation), got {len(self.text):,}. Use a longer text or a shorter --length"
            )
        if share is not None:
            spans = [(stop - round(share * (stop - start)), stop) for start, stop in self.text.spans]
        else:
            spans = _places(len(self.text), validation_bytes, 1 if held_out == END else _PLACES, end=held_out == END)
        return Split(*self.text.apart(spans))

    def bytes_of_share(self, share: float) -> int:
        """How many bytes that share of each document is.

        Raises:
            InputError: fewer than two.
        """
        found = sum(round(share * (stop - start)) for start, stop in self.text.spans)
        if found < 2:
            raise InputError(
                f"{self.name}: expected a share of its documents that is at least 2 bytes, {share:g} is {found}"
            )
        return found


def as_share(held_out: str) -> float | None:
    """The number between 0 and 1 that it is, or None."""
    try:
        number = float(held_out)
    except ValueError:
        return None
    return number if 0 < number < 1 else None


def _places(num_bytes: int, held_out: int, most: int, *, end: bool) -> list[tuple[int, int]]:
    """Stretches of `held_out` bytes in all: each in the middle of its part of the text, or one at the end."""
    if end:
        return [(num_bytes - held_out, num_bytes)]
    count = max(1, min(most, held_out // _LEAST))
    edges = [i * num_bytes // count for i in range(count + 1)]
    sizes = [(i + 1) * held_out // count - i * held_out // count for i in range(count)]
    spans = list[tuple[int, int]]()
    for (low, high), size in zip(itertools.pairwise(edges), sizes, strict=True):
        start = max(low + (high - low - size) // 2, spans[-1][1] if spans else 0)
        spans.append((start, start + size))
    return spans


def load_corpus(
    source: str | Path | None = None, *, data_dir: Path | None = None, reading: Reading = AS_BYTES
) -> Corpus:
    """A corpus with a name, or the bytes of a file or a folder.

    Args:
        source: one of `KNOWN` (None: "pydocs"), or a path: a `Path`, or a string, which takes a separator where it is
            one of `KNOWN` ("./ptb"). Of a folder, every file below it is read, in the byte order of relative paths;
            left out are empty ones, those of which a part begins with a dot, and the folders of runs. Links are
            followed, but no folder is read twice.
        data_dir: where the files of a corpus with a name lie (see `fetch`); None: fetched.
        reading: what the documents of a file are; by default it is one, as it is, or decompressed.

    Raises:
        InputError: nothing of that name, nothing to read in it, not of the format, damaged, or it cannot be read or
            fetched.
    """
    if reading.format != "bytes" and (source is None or (isinstance(source, str) and source in KNOWN)):
        raise InputError(f"format={reading.format}: expected files that are read, {source or PYDOCS} is a corpus")
    if source is None or source == PYDOCS:
        return Corpus(name=PYDOCS, source="pydoc_data.topics of this Python installation", text=Documents([pydocs()]))
    if isinstance(source, str) and source in KNOWN:
        return _load_known(source, data_dir)
    path = Path(source)
    with _reading(path):
        if source == "-" and not path.exists():
            raise InputError("-: a text is read more than once, and standard input cannot be. Write it to a file first")
        if source == "" or not path.exists():
            raise InputError(
                f"{source or repr('')}: expected a file or folder, or one of {', '.join(KNOWN)}, copying; found "
                "nothing of that name. Check the path"
            )
        if not path.is_dir():
            open_file(path)
            return Corpus(name=path.stem or path.name, source=str(path), text=Documents(read_documents(path, reading)))
        files, runs = _files_below(path)
    if not files:
        raise InputError(
            f"{path}: expected a folder with files to read, found none below it that is neither empty nor hidden. Name "
            "another folder"
        )
    with _reading(path):
        text = Documents([document for file in files for document in read_documents(open_file(file).path, reading)])
    if runs:
        those = f"{runs[0]} and {len(runs) - 1} more" if len(runs) > 1 else str(runs[0])
        logger.warning("%s: what a run writes is no part of the corpus, and left out: %s", path, those)
    name = os.path.basename(os.path.abspath(path)) or "files"  # "." has a name too
    return Corpus(name=name, source=f"{len(files):,} files below {path}", text=text)


def open_file(path: Path) -> FileBytes:
    """Any file's bytes, which are read when they are used. The file must keep its length meanwhile.

    Raises:
        InputError: no such file, not a regular file, empty, or not readable.
    """
    with _reading(path):
        if not path.exists():
            raise InputError(f"{path}: expected a file, found nothing of that name. Check the path")
        if not path.is_file():
            pipe = "a pipe, and a text is read more than once" if path.is_fifo() else "neither a file nor a directory"
            kind = "a directory" if path.is_dir() else pipe
            raise InputError(f"{path}: expected a file, found {kind}. Name one file")
        with path.open("rb") as file:  # the system's own words for what it refuses
            size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise InputError(f"{path}: expected bytes to read, the file is empty. Name another file")
    return FileBytes(path, 0, size)


def map_file(path: str | Path) -> Tensor:
    """Any file's bytes as uint8 `[bytes]`, memory-mapped: pages are read when touched, and may be dropped again.

    Never write to the tensor; the file must keep its length while it lives. It keeps a descriptor open. Pages that were
    touched count as resident memory of the process.

    Raises:
        InputError: no such file, not a regular file, empty, or not readable.
    """
    path = open_file(Path(path)).path
    with _reading(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r"))


def _load_known(name: str, data_dir: Path | None) -> Corpus:
    paths = fetch(name, data_dir=data_dir)
    source = " and ".join(map(str, paths))
    parts = [Documents([open_file(path)]) for path in paths]
    if name == ENWIK8:
        text, rest = parts[0].cut(_ENWIK8_TRAINING)
        return Corpus(name=name, source=source, text=text, validation=rest.cut(_ENWIK8_VALIDATION)[0])
    return Corpus(name=name, source=source, text=parts[0], validation=parts[1] if len(parts) > 1 else None)


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Regular files with something in them, in the byte order of their relative paths; and the folders of runs."""
    files: list[Path] = []
    runs: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders = [folder]
    while folders:
        here = folders.pop()
        state = here.stat()
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        if here != folder and _is_run(here):
            runs.append(here)
            continue
        visible = sorted((path for path in here.iterdir() if not path.name.startswith(".")), key=os.fsencode)
        files += [path for path in visible if path.is_file() and path.stat().st_size]
        folders += [path for path in reversed(visible) if path.is_dir()]
    return sorted(files, key=os.fsencode), sorted(runs, key=os.fsencode)


def _is_run(folder: Path) -> bool:
    """Whether `slimgrad train` made it: what a run writes must not become part of what it reads."""
    return all((folder / name).exists() for name in ("config.json", "snapshots"))


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turn the system's refusal to read into an `InputError` that names the file."""
    try:
        yield
    except OSError as error:
        refused = error.filename or path
        raise InputError(
            f"{refused}: expected a readable file or folder, got: {error.strerror or error}. Check its rights"
        ) from error
