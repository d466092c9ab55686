"""Numbers and bytes in words."""

from __future__ import annotations

from slimgrad.cli.generating import decoded
from slimgrad.cli.words import megabytes, printable


def test_bytes_are_told_in_megabytes() -> None:
    assert megabytes(None) == "not measured"
    assert megabytes(1_234_500_000) == "1,234 MB"


def test_control_characters_never_reach_a_terminal() -> None:
    assert printable("a\tb\r\n\x1b[31m\x00é") == "a\tb\n\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}é"


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    assert list(decoded(iter("é€".encode()), b"\xf0\x9f")) == ["", "\N{REPLACEMENT CHARACTER}", "é", "", "", "€", ""]
    assert "".join(decoded(iter([0xE2]), b"a")) == "a\N{REPLACEMENT CHARACTER}"
