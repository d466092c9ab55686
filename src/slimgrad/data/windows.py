"""Where windows lie in a sequence of bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from slimgrad.errors import InputError


def consecutive_starts(num_bytes: int, length: int) -> range:
    """Where windows of `length` start, one after the other without overlap; a last one that is shorter is left out."""
    require_window(num_bytes, length)
    return range(0, num_bytes - length + 1, length)


def shuffled_starts(num_bytes: int, length: int, generator: torch.Generator) -> Iterator[int]:
    """Where training windows start, without end: each pass takes consecutive windows in random order.

    Each pass begins at another random offset, so that window edges fall elsewhere.

    Args:
        num_bytes: bytes to cut windows from.
        length: bytes of one window.
        generator: decides offsets and orders; the same seed gives the same starts.
    """
    require_window(num_bytes, length)
    while True:
        spare = min(length - 1, num_bytes - length)
        offset = int(torch.randint(spare + 1, (), generator=generator))
        count = (num_bytes - offset) // length
        for index in torch.randperm(count, generator=generator).tolist():
            yield offset + index * length


def require_window(num_bytes: int, length: int) -> None:
    """Raise `InputError` where not one window fits."""
    if not 1 <= length <= num_bytes:
        raise InputError(f"length={length:,}: expected between 1 and the {num_bytes:,} bytes there are")
