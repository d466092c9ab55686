"""Numbers and bytes in words."""

from __future__ import annotations


def megabytes(num_bytes: int | None) -> str:
    """Bytes in words."""
    return "not measured" if num_bytes is None else f"{num_bytes / 1e6:,.0f} MB"


def printable(text: str) -> str:
    """What a terminal can show: carriage returns go, other control characters become a replacement mark."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text if c != "\r")
