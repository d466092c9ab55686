"""Bits per byte over a sequence of any length, read as a stream: memory depends on the chunk alone.

The sequence never lies in memory whole, and neither do its losses: pieces of it go through the model one by one, and
the state goes from piece to piece. Cost: one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from slimgrad.api import evaluate
from slimgrad.errors import InputError
from slimgrad.models.performer import Performer

CHUNKS_IN_A_PIECE = 16


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a sequence costs by a model.

    Attributes:
        bits: summed over the predicted bytes.
        predicted: how many bytes were predicted: all but the first of each sequence.
        num_bytes: bytes read.
    """

    bits: float = 0.0
    predicted: int = 0
    num_bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        """The mean over the predicted bytes."""
        return self.bits / self.predicted

    def __add__(self, other: Evaluated) -> Evaluated:
        return Evaluated(
            bits=self.bits + other.bits,
            predicted=self.predicted + other.predicted,
            num_bytes=self.num_bytes + other.num_bytes,
        )


def evaluate_stream(
    model: Performer, pieces: Iterable[Tensor], *, chunk: int, report: Callable[[Evaluated], None] | None = None
) -> Evaluated:
    """Bits of one sequence that comes in pieces.

    Args:
        model: over bytes.
        pieces: uint8 `[bytes]`, of any lengths, one after the other.
        chunk: bytes that go through the model at once.
        report: called after every piece with the result so far.

    Raises:
        InputError: fewer than two bytes: nothing to predict.
    """
    if chunk < 1:
        raise InputError(f"chunk={chunk}: expected at least 1")
    so_far, state = Evaluated(), None
    last = torch.empty(0, dtype=torch.uint8)
    for piece in pieces:
        joined = torch.cat([last, piece])
        so_far += Evaluated(num_bytes=len(piece))
        if len(joined) > 1:
            found, state = _evaluate_piece(model, joined, chunk, state)
            so_far += found
        last = joined[-1:].clone()
        if report is not None:
            report(so_far)
    if so_far.predicted == 0:
        raise InputError(f"expected at least two bytes, one to read and one to predict, got {so_far.num_bytes}")
    return so_far


def read_pieces(file: BinaryIO, piece_bytes: int) -> Iterator[Tensor]:
    """A binary file or pipe as uint8 tensors of `piece_bytes` (the last may be shorter)."""
    while content := file.read(piece_bytes):
        yield torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _evaluate_piece(model: Performer, joined: Tensor, chunk: int, state: Any) -> tuple[Evaluated, Any]:
    result = evaluate(model, joined[None, :-1], joined[None, 1:].long(), chunk=chunk, state=state)
    bits = float(result.loss) * result.num_targets / math.log(2)
    return Evaluated(bits=bits, predicted=result.num_targets), result.final_state
