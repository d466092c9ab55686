"""Windows over a sequence of bytes, and the split into training and validation.

Everything is a view: nothing is copied, so a memory-mapped file stays on disk until a window is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from slimgrad.errors import InputError


class Split(NamedTuple):
    """Training bytes first, validation bytes last, no byte in both."""

    train: Tensor
    validation: Tensor


def split_bytes(data: Tensor, *, validation: int, window: int) -> Split:
    """Cut the last `validation` bytes off.

    Args:
        data: uint8 `[bytes]`.
        validation: bytes kept for validation, at least 2.
        window: bytes that the training part must have at least.

    Raises:
        InputError: where the data is too short for both.
    """
    if validation < 2:
        raise InputError(f"validation={validation}: expected at least 2 bytes, one to read and one to predict")
    if len(data) < window + validation:
        raise InputError(
            f"expected at least {window + validation:,} bytes (one window of {window:,} and {validation:,} for "
            f"validation), got {len(data):,}. Use a longer file or a shorter --length"
        )
    return Split(data[:-validation], data[-validation:])


def consecutive_windows(data: Tensor, length: int) -> Iterator[Tensor]:
    """Windows of `length`, one after the other without overlap; a last one that is shorter is left out."""
    _require_window(len(data), length)
    return (data[start : start + length] for start in range(0, len(data) - length + 1, length))


def shuffled_starts(num_bytes: int, length: int, generator: torch.Generator) -> Iterator[int]:
    """Where training windows start, without end: each pass takes consecutive windows in random order.

    Each pass begins at another random offset, so that window edges fall elsewhere.

    Args:
        num_bytes: bytes to cut windows from.
        length: bytes of one window.
        generator: decides offsets and orders; the same seed gives the same starts.
    """
    _require_window(num_bytes, length)
    while True:
        spare = min(length - 1, num_bytes - length)
        offset = int(torch.randint(spare + 1, (), generator=generator))
        count = (num_bytes - offset) // length
        for index in torch.randperm(count, generator=generator).tolist():
            yield offset + index * length


def _require_window(num_bytes: int, length: int) -> None:
    if not 1 <= length <= num_bytes:
        raise InputError(f"length={length:,}: expected between 1 and the {num_bytes:,} bytes there are")
