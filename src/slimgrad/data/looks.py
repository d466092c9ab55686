"""What a file looks like by its first bytes: compressed bytes are no text, and other kinds are worth a word."""

from __future__ import annotations

import logging
from pathlib import Path

from slimgrad.errors import InputError

logger = logging.getLogger("slimgrad")

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dk"),
    b"\xfd7zXZ\x00": ("xz", "xz -dk"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "zstd -d"),
    **{b"BZh%d1AY&SY" % level: ("bzip2", "bzip2 -dk") for level in range(1, 10)},
}
_OTHER = {
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet table",
    b"%PDF-": "a PDF",
    b"\xff\xfe": "UTF-16 text, with two bytes for each character",
    b"\xfe\xff": "UTF-16 text, with two bytes for each character",
    b"\xef\xbb\xbf": "UTF-8 text that begins with a byte order mark",
}
_MOST = max(map(len, (*_COMPRESSED, *_OTHER)))


def require_text(path: Path) -> None:
    """Refuse a compressed file; of other kinds that are not plain text, say so.

    Raises:
        InputError: it is compressed: with the command that makes a text of it.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_MOST)
    for magic, (kind, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise InputError(
                f"{path}: expected text, found a file that is compressed by {kind}. First: {command} {path}"
            )
    for magic, kind in _OTHER.items():
        if head.startswith(magic):
            logger.warning("%s looks like %s: its bytes are taken as they are", path, kind)
