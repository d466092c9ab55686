"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

from slimgrad.errors import InputError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes from "800MB", "1.5 GiB" or "800000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise InputError(f"{text!r}: expected an amount of memory such as 800MB, 1.5GB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def in_megabytes(num_bytes: float) -> str:
    """Bytes in words, as "12.3 MB"."""
    return f"{num_bytes / 1e6:,.1f} MB"
