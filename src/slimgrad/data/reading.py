"""From files to documents: bytes as they are, the records of FASTA files, or a field of JSON lines.

A file that is compressed, or of which only a part is read, is turned into its documents once: one after the other in a
file of the cache, with a list of where each ends. It is called by the checksum of what it was made from and by how that
was read, so another file, or the same one changed, is never taken for it; its own checksum is compared at each use.
Cost: memory for one line; disk for the documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from slimgrad.data.cache import cache_folder, not_readable, sha256_of, writing
from slimgrad.data.documents import FileBytes
from slimgrad.data.looks import Compression, compression_of, tell_what_it_looks_like
from slimgrad.data.options import AS_BYTES, Format, Reading
from slimgrad.errors import InputError
from slimgrad.extras import require_extra

logger = logging.getLogger("slimgrad")

_PIECE = 1 << 16
_WINDOW = 1 << 31  # bytes that zstandard may look back, as `zstd --long=31` allows


def read_documents(path: Path, reading: Reading = AS_BYTES) -> list[FileBytes]:
    """The documents of a file, decompressed where it is compressed by gzip, xz, bzip2 or zstandard; none is empty.

    What is in a file already is read when it is used; anything else is made in the cache first.

    Raises:
        InputError: the file is damaged, not of that format, or holds no document; or the cache cannot be written to.
        OSError: it cannot be read.
    """
    compression = compression_of(path)
    if compression is None and reading.format == "bytes":
        tell_what_it_looks_like(path, path)
        return [FileBytes(path, 0, path.stat().st_size)]
    needed = ["filelock", "pooch", *(["zstandard"] if compression == "zstandard" else [])]
    require_extra("train", f"{path}: its documents are made once", *needed)
    made, ends = _made(path, compression, reading)
    if not ends:
        what = "a record with a sequence" if reading.format == "fasta" else "a document with something in it"
        raise InputError(f"{path}: expected {what}, found none. Name another file or format")
    if reading.format == "bytes":
        tell_what_it_looks_like(made, path)
    return [FileBytes(made, start, stop) for start, stop in itertools.pairwise([0, *ends])]


def _made(path: Path, compression: Compression | None, reading: Reading) -> tuple[Path, list[int]]:
    """The file of the cache, and where each document ends in it; made now unless it is there and whole."""
    how = [reading.format, reading.field if reading.format == "jsonl" else "", reading.fold_case]
    key = hashlib.sha256(json.dumps([sha256_of(path), *how]).encode()).hexdigest()[:32]
    made, record = cache_folder() / f"{key}.documents", cache_folder() / f"{key}.json"
    if (ends := _recorded(made, record)) is not None:
        return made, ends
    with writing(made):
        ends = _recorded(made, record)  # another process may have been faster
        if ends is None:
            partial = made.with_name(f".partial-{made.name}")
            try:
                ends = _write(path, compression, reading, partial)
                partial.replace(made)
                partial.write_text(json.dumps({"sha256": sha256_of(made), "ends": ends}), encoding="utf-8")
                partial.replace(record)
            finally:
                partial.unlink(missing_ok=True)
            what = f"{len(ends):,} document{'s' if len(ends) != 1 else ''}" if reading.format != "bytes" else "text"
            logger.warning("%s: %s of %s bytes from it, kept in %s", path, what, f"{made.stat().st_size:,}", made)
    return made, ends


def _recorded(made: Path, record: Path) -> list[int] | None:
    """Where documents end in a file that was made before; None where it is not there, or is damaged."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        return cast("list[int]", found["ends"]) if sha256_of(made) == found["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


def _write(path: Path, compression: Compression | None, reading: Reading, target: Path) -> list[int]:
    """Write the documents one after the other, and return where each ends."""
    ends: list[int] = []
    written = 0
    try:
        with target.open("wb") as file:
            for part in _PARTS[reading.format](_pieces(path, compression), reading):
                if part is not None:
                    written += file.write(part)
                elif written > (ends[-1] if ends else 0):
                    ends.append(written)
    except _MisfitError as error:
        raise InputError(f"{path}: {error}") from error
    return ends


class _MisfitError(Exception):
    """Content that is not of the format."""


def _errors_of(compression: Compression | None) -> tuple[type[Exception], ...]:
    """What a decompressor raises that is no error of the system or of zlib."""
    if compression == "xz":
        import lzma

        return (lzma.LZMAError,)
    if compression == "zstandard":
        import zstandard

        return (zstandard.ZstdError,)
    return ()


def _pieces(path: Path, compression: Compression | None) -> Iterator[bytes]:
    """The bytes of a file, decompressed.

    Raises:
        InputError: it is damaged, or cannot be read: said of this file, since whoever asks for a piece writes another.
    """
    try:
        yield from _decompressed(path, compression)
    except (EOFError, OSError, zlib.error, *_errors_of(compression)) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not the decompressor's
            raise not_readable(path, error) from error
        raise InputError(
            f"{path}: expected a whole file that is compressed by {compression}, got: {str(error) or 'its end'}. It is "
            "damaged or cut off: get it again"
        ) from error


def _decompressed(path: Path, compression: Compression | None) -> Iterator[bytes]:
    if compression == "zstandard":
        yield from _zstandard(path)
        return
    with _opener(compression)(path) as file:
        while piece := file.read(_PIECE):
            yield piece


def _opener(compression: Compression | None) -> Callable[[Path], Any]:
    import bz2
    import gzip
    import lzma

    openers: dict[Compression | None, Callable[[Path], Any]] = {
        None: lambda path: path.open("rb"), "gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open,
    }  # fmt: skip
    return openers[compression]


def _zstandard(path: Path) -> Iterator[bytes]:
    """Frame by frame: the package's own file objects end without a word where a file was cut off."""
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    frame = context.decompressobj()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            while piece:
                if frame.eof:
                    frame = context.decompressobj()
                yield frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Without what ends them."""
    rest: list[bytes] = []
    for piece in pieces:
        first, *more = piece.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest).rstrip(b"\r")
            yield from (line.rstrip(b"\r") for line in more[:-1])
            rest = [more[-1]]
    if last := b"".join(rest).rstrip(b"\r"):
        yield last


# Parts of documents, each document followed by None.
_Parts = Iterator["bytes | None"]


def _as_it_is(pieces: Iterator[bytes], _: Reading) -> _Parts:
    yield from pieces
    yield None


def _fasta(pieces: Iterator[bytes], reading: Reading) -> _Parts:
    """Source: W. R. Pearson's format: `>` begins a record's header, `;` a comment; white space does not count."""
    began = False
    for number, line in enumerate(_lines(pieces), 1):
        if line.startswith((b">", b";")):
            began = True
            if line.startswith(b">"):
                yield None
            continue
        sequence = line.translate(None, b" \t\v\f\r")
        if sequence and not began:
            raise _MisfitError(
                f"expected FASTA, with a header that begins with > before its first sequence, found {line[:20]!r} in "
                f"line {number:,}. Name the format that it has"
            )
        yield sequence.upper() if reading.fold_case else sequence
    yield None


def _jsonl(pieces: Iterator[bytes], reading: Reading) -> _Parts:
    for number, line in enumerate(_lines(pieces), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise _MisfitError(
                f"expected JSON lines, found in line {number:,} what is none ({error}). Name the format that it has"
            ) from error
        text = cast("dict[str, Any]", found).get(reading.field) if isinstance(found, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(map(repr, cast("dict[str, Any]", found))) if isinstance(found, dict) else "no fields"
            raise _MisfitError(
                f"expected text in the field {reading.field!r} of every line, found none in line {number:,}, which has "
                f"{fields}. Name the field: --field NAME"
            )
        yield text.encode("utf-8", errors="surrogatepass")
        yield None


_PARTS: dict[Format, Callable[[Iterator[bytes], Reading], _Parts]] = {
    "bytes": _as_it_is, "fasta": _fasta, "jsonl": _jsonl,
}  # fmt: skip
