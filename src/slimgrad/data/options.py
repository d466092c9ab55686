"""How files are read, which of a text is held out, and in which order it comes. Plain values: torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from slimgrad.errors import InputError

Format = Literal["bytes", "fasta", "jsonl"]
Order = Literal["shuffled", "consecutive", "random", "documents"]
SPREAD, END = "spread", "end"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become documents.

    Attributes:
        format: "bytes" (a file is a document), "fasta" (a record is one: its sequence without header and line breaks),
            or "jsonl" (a line is one: the text of one field, as UTF-8).
        field: of JSON lines.
        fold_case: of FASTA: small letters, which mark repeats, become capitals.

    Raises:
        InputError: no such format, or letters to fold in another one.
    """

    format: Format = "bytes"
    field: str = "text"
    fold_case: bool = False

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise InputError(f"format={self.format!r}: expected one of {', '.join(get_args(Format))}")
        if self.fold_case and self.format != "fasta":
            raise InputError(f"fold_case: expected format=fasta, got {self.format}")


AS_BYTES = Reading()
