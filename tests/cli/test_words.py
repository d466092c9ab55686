"""Numbers and bytes in words, and back."""

from __future__ import annotations

import pytest

from slimgrad.cli.generating import decoded
from slimgrad.cli.words import megabytes, parse_bytes, printable
from slimgrad.errors import InputError


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


def test_bytes_are_told_in_megabytes() -> None:
    assert megabytes(None) == "not measured"
    assert megabytes(1_234_500_000) == "1,234 MB"


def test_control_characters_never_reach_a_terminal() -> None:
    assert printable("a\tb\r\n\x1b[31m\x00é") == "a\tb\n\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}é"


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    assert list(decoded(iter("é€".encode()), b"\xf0\x9f")) == ["", "\N{REPLACEMENT CHARACTER}", "é", "", "", "€", ""]
    assert "".join(decoded(iter([0xE2]), b"a")) == "a\N{REPLACEMENT CHARACTER}"
