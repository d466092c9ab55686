"""Rows along time in the files of a saved segment: written once, and appended to by each save that comes later.

    rows-91be....bin     what one save added: rows of some series that were not on the disk yet, `[batch, new, ...]`

A file bears the name of its content and is never changed. Gradients of rows, which change from save to save, have a
file that the next one takes the place of. Which files there are, and what is in them, is part of the document that
speaks of them.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from slimgrad.errors import InputError
from slimgrad.runs.files import PARTIAL, push_to_disk, sha256
from slimgrad.sweep.files import bytes_of
from slimgrad.sweep.series import Rows

_ALIGNED = 64  # bytes: where the rows of a part begin
_MARK = "rows of"


class Part(NamedTuple):
    """Some rows of one series, `[batch, stop - start, ...]`: where they lie."""

    file: str
    offset: int
    start: int
    stop: int


class SavedRows:
    """What stands in the files of rows of one folder.

    Args:
        folder: where they are.
        saved: what `as_dict` gave; None: there are none.
    """

    def __init__(self, folder: Path, saved: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._parts: dict[str, list[Part]] = {}  # by the place of the rows in the document
        for name, parts in (saved or {"parts": {}})["parts"].items():
            self._parts[name] = [Part(*part) for part in parts]
        self.checksums: dict[str, str] = dict(saved["checksums"]) if saved else {}  # sha256 of each file, by its name

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        parts = {name: [list(part) for part in parts] for name, parts in self._parts.items()}
        return {"parts": parts, "checksums": self.checksums}

    def with_new(self, series: Mapping[str, Rows]) -> SavedRows:
        """Write what is not on the disk yet; what is there stays. Raises OSError."""
        found = SavedRows(self.folder)
        found._parts = {name: self._lasting(name, rows) for name, rows in series.items()}
        ends = {name: parts[-1].stop if parts else 0 for name, parts in found._parts.items()}
        for steady in (True, False):
            new = [n for n, rows in series.items() if rows.steady == steady and rows.length > ends[n]]
            if new:
                found._write({name: (series[name], ends[name]) for name in new})
        files = {part.file for parts in found._parts.values() for part in parts}
        found.checksums |= {name: self.checksums[name] for name in files & self.checksums.keys()}
        return found

    def check(self) -> None:
        """Raise InputError if a file is not what was written, and FileNotFoundError if it is not there."""
        for name, checksum in self.checksums.items():
            if sha256(self.folder / name) != checksum:
                raise InputError(f"{self.folder / name} is damaged: expected sha256 {checksum[:12]}..., found another")

    def put_back(self, document: Any) -> Any:
        """The document that `taken_out` was given, its rows mapped from their files."""
        if isinstance(document, dict):
            if _MARK in document:
                return self._mapped(**document[_MARK])
            return {key: self.put_back(value) for key, value in cast("dict[Any, Any]", document).items()}
        if type(document) in (list, tuple):
            return type(document)(map(self.put_back, document))
        return document

    def _lasting(self, name: str, rows: Rows) -> list[Part]:
        """Parts that are on the disk, and still what they should be."""
        parts = self._parts.get(name, [])
        if not rows.steady or not all((self.folder / part.file).exists() for part in parts):
            return []  # gone where someone else has saved
        return [part for part in parts if part.stop <= rows.length]

    def _write(self, chosen: Mapping[str, tuple[Rows, int]]) -> None:
        """One file: of each series, by its name, the rows from one on."""
        partial, checksum, place = self.folder / f"{PARTIAL}rows", hashlib.sha256(), 0
        written: list[tuple[str, int, int, int]] = []
        try:
            with partial.open("wb") as file:

                def put(data: Any) -> None:
                    nonlocal place
                    file.write(data)
                    checksum.update(data)
                    place += len(data)

                for name, (rows, first) in chosen.items():
                    start = first
                    for piece in rows.pieces(start):
                        stop, goes_on = start + piece.shape[1], start > first and piece.shape[0] == 1
                        if goes_on:  # beside the ones before
                            written[-1] = (*written[-1][:3], stop)
                        else:
                            put(bytes(-place % _ALIGNED))
                            written.append((name, place, start, stop))
                        for one in piece:
                            put(bytes_of(one.detach().cpu().contiguous()))
                        start = stop
            push_to_disk(partial)
            own = f"rows-{checksum.hexdigest()[:16]}.bin"
            partial.replace(self.folder / own)
        finally:
            partial.unlink(missing_ok=True)
        self.checksums[own] = checksum.hexdigest()
        for name, *where in written:
            self._parts[name].append(Part(own, *where))

    def _mapped(self, name: str, shape: list[int], dtype: torch.dtype, length: int, steady: bool) -> Rows:
        batch, _, *row = shape
        files = {part.file: _bytes(self.folder / part.file) for part in self._parts[name]}
        pieces: list[Tensor] = []
        for part in self._parts[name]:
            own = torch.Size([batch, part.stop - part.start, *row])
            data = files[part.file][part.offset : part.offset + own.numel() * dtype.itemsize]
            pieces.append(data.view(dtype).view(own))

        def all_pieces(first: int) -> Iterator[Tensor]:
            assert first == 0
            return iter(pieces)

        return Rows(tuple(shape), dtype, length, steady, all_pieces)


def taken_out(document: Any, found: dict[str, Rows], name: str = "") -> Any:
    """A document of dicts, lists and tuples without the `Rows` in it: these go to `found`, by their place."""
    if isinstance(document, Rows):
        found[name] = document
        shape, dtype, length, steady, _ = document
        return {_MARK: {"name": name, "shape": list(shape), "dtype": dtype, "length": length, "steady": steady}}
    if isinstance(document, dict):
        items = cast("dict[Any, Any]", document).items()
        return {key: taken_out(value, found, f"{name}/{key}") for key, value in items}
    if type(document) in (list, tuple):
        return type(document)(taken_out(value, found, f"{name}/{k}") for k, value in enumerate(document))
    return document


def _bytes(path: Path) -> Tensor:
    """A file's, mapped."""
    with path.open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
