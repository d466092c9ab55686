"""What a training run is: every number of it, validated before anything runs."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from typing import Any

from slimgrad.errors import InputError
from slimgrad.models.performer import PerformerConfig
from slimgrad.models.presets import Preset


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: the Performer's shape.
        length: bytes of the longest training sequence (L); one sequence is one step.
        first_length: bytes of the first sequences; the length doubles until it is `length`, each having an equal share
            of the bytes (see `step_lengths`). 0: all have `length`.
        chunk: bytes whose graph lives at once (C).
        steps: optimiser steps.
        learning_rate: the highest, after the warm-up.
        warmup: fraction of the training bytes over which the learning rate rises; it falls to zero along a cosine.
        weight_decay: of matrices; vectors (biases, norms) are not decayed.
        betas: AdamW's.
        clip_norm: the norm that the gradient of all parameters together is scaled down to.
        validation_bytes: bytes at the end of the corpus that are kept for validation.
        validations: how many times the validation bytes are gone through, evenly over the training bytes, the last time
            after the last step.
        seed: decides the parameters and the order of the windows.
    """

    model: PerformerConfig
    length: int
    first_length: int = 0
    chunk: int
    steps: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    validation_bytes: int = 32_768
    validations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"length": 2, "chunk": 1, "steps": 1, "validations": 1, "validation_bytes": 2}.items():
            _require(self, name, getattr(self, name) >= least, f"at least {least}")
        for name in ("learning_rate", "clip_norm"):
            _require(self, name, 0 < getattr(self, name) < float("inf"), "a positive number")
        _require(self, "weight_decay", self.weight_decay >= 0, "zero or more")
        _require(self, "warmup", 0 <= self.warmup <= 1, "a fraction between 0 and 1")
        _require(self, "first_length", self.first_length == 0 or self.first_length >= 2, "0, or at least 2")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _require(self, "seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")

    def step_lengths(self) -> list[int]:
        """Bytes of each step's sequence, never falling; the last step has `length`.

        Early in training many small steps teach more than few large ones, and late it is the other way round.
        """
        lengths = [min(self.first_length or self.length, self.length)]
        while lengths[-1] < self.length:
            lengths.append(min(2 * lengths[-1], self.length))
        shares = [1 / length for length in lengths]
        ends = [round(self.steps * sum(shares[: i + 1]) / sum(shares)) for i in range(len(lengths))]
        by_step = (bisect.bisect_right(ends, step) for step in range(self.steps - 1))
        return [*(lengths[index] for index in by_step), self.length]

    def to_dict(self) -> dict[str, Any]:
        """Every number, nested as the dataclasses are; plain enough for JSON."""
        return dataclasses.asdict(self)


def config_for(preset: Preset, **overrides: Any) -> TrainConfig:
    """The run that a preset stands for. Overrides that are None leave the preset's number.

    A chunk longer than the sequence is one chunk, as everywhere in slimgrad.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    fields = {
        name: getattr(preset, name) for name in ("model", "length", "first_length", "chunk", "steps", "learning_rate")
    }
    return TrainConfig(**(fields | given))


def _require(config: TrainConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name}={getattr(config, name)}: expected {expected}")
