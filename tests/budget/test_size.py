"""Amounts of memory, as people write them."""

from __future__ import annotations

import pytest

from slimgrad import InputError
from slimgrad.budget.size import parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("800000000", 800_000_000), ("800MB", 800_000_000), ("1.5 GiB", 3 * 2**29), ("2gib", 2**31),
        (" 3 kB ", 3000), ("0.5GB", 500_000_000), ("1KiB", 1024), ("4MiB", 2**22),
    ],
)  # fmt: skip
def test_amounts_of_memory_are_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "much", "-5MB", "5 TB", "MB", "1e9", "5MB or so", "1.GB", ".5GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected an amount of memory such as 800MB"):
        parse_bytes(text)
