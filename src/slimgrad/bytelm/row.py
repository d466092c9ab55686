"""What one step of a run measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one step measured.

    Attributes:
        step: from 1.
        length: bytes of this step's longest sequence.
        num_bytes: bytes of all its sequences.
        bytes_seen: training bytes so far.
        seconds: since the first step began, validation included; time between two sessions of a run not.
        bits: training loss of this step, before the step, in bits per byte.
        validation_bits: after this step, in bits per byte; None where it was not measured.
        validation_accuracy: fraction of the validation bytes that are the likeliest by the model; None likewise.
        learning_rate: of this step.
        gradient_norm: before clipping.
        bytes_per_second: of this step, validation not included.
        resident_bytes: memory of the process after the step; None where the platform does not tell.
    """

    step: int
    length: int
    num_bytes: int
    bytes_seen: int
    seconds: float
    bits: float
    validation_bits: float | None
    validation_accuracy: float | None
    learning_rate: float
    gradient_norm: float
    bytes_per_second: float
    resident_bytes: int | None


Report = Callable[[Row], None]
