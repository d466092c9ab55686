"""What a file is by its first bytes: whether it is compressed, and which other kinds are worth a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

logger = logging.getLogger("slimgrad")

Compression = Literal["gzip", "xz", "bzip2", "zstandard"]

_COMPRESSED: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
}
_AS_THEY_ARE = "its bytes are taken as they are"
_OTHER = {
    b"PK\x03\x04": f"a zip archive: {_AS_THEY_ARE}",
    b"PAR1": f"a parquet table: {_AS_THEY_ARE}",
    b"%PDF-": f"a PDF: {_AS_THEY_ARE}",
    b"\xff\xfe": f"UTF-16 text, with two bytes for each character: {_AS_THEY_ARE}",
    b"\xfe\xff": f"UTF-16 text, with two bytes for each character: {_AS_THEY_ARE}",
    b"\xef\xbb\xbf": f"UTF-8 text that begins with a byte order mark: {_AS_THEY_ARE}",
}
_TAR, _TAR_AT = b"ustar", 257
_BY_SUFFIX = {
    **dict.fromkeys(
        (".fa", ".fasta", ".fna", ".faa", ".ffn"),
        (b">", f"FASTA: {_AS_THEY_ARE}. --format fasta leaves out headers and line breaks"),
    ),
    **dict.fromkeys(
        (".jsonl", ".ndjson"),
        (b"{", f"JSON lines: {_AS_THEY_ARE}. --format jsonl --field NAME takes a field of each line as a document"),
    ),
}


def compression_of(path: Path) -> Compression | None:
    """By what a file is compressed; None: by nothing that is known here. Raises OSError where it cannot be read."""
    head = _head(path)
    return next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)


def tell_what_it_looks_like(path: Path, name: Path) -> None:
    """A warning about a file that is not plain text, and is about to be taken for it.

    Args:
        path: the file.
        name: what it is called by those who named it; its endings count, but for that of a compression.
    """
    head = _head(path)
    found = next((words for magic, words in _OTHER.items() if head.startswith(magic)), None)
    if head[_TAR_AT:].startswith(_TAR):
        found = f"a tar archive: {_AS_THEY_ARE}. Unpack it, and name the folder"
    for suffix in name.suffixes:
        begins, words = _BY_SUFFIX.get(suffix.lower(), (b"", ""))
        if begins and head.startswith(begins):
            found = words
    if found:
        logger.warning("%s looks like %s", name, found)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_TAR_AT + len(_TAR))
