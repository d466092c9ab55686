"""What a training run is: every number of it, validated before anything runs, and saved with the run."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from slimgrad.bytelm.device import DEVICES
from slimgrad.bytelm.gradient import METHODS, Method
from slimgrad.data import Order
from slimgrad.errors import InputError
from slimgrad.models.performer import PerformerConfig
from slimgrad.models.presets import Preset
from slimgrad.sweep.schedules.names import parse_schedule


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: the Performer's shape.
        task: "text" (the bytes of a corpus), or "copying" (generated: the paper's section 4.3).
        length: bytes of the longest training sequence (L).
        first_length: bytes of the first sequences; the length doubles until it is `length`, each having an equal share
            of the bytes (see `step_lengths`). 0: all have `length`.
        batch: sequences that go through the model together.
        accumulate: batches whose gradients add up to one step's; the mean is over all their targets.
        windows: how sequences are cut from the text: "shuffled" (passes over consecutive windows, in random order),
            "consecutive", "random" (from any byte on), or "documents" (whole ones, each at its own length).
        method: how the gradient is computed: "chunked" (in the memory of one chunk), "checkpoint" (each layer is
            computed twice), or "plain". All three give the same gradient.
        chunk: for "chunked": bytes whose graph lives at once (C).
        schedule: for "chunked": which states are kept and where, see `parse_schedule`; "auto" chooses by their size.
        device: "cpu", "cuda", or "auto": the GPU where there is one.
        precision: "float32", or "bf16": autocast, with parameters and states in float32.
        steps: optimiser steps.
        learning_rate: the highest, after the warm-up.
        warmup: fraction of the training bytes over which the learning rate rises.
        decay: what follows: "cosine" (half a cosine, down to zero), "constant", or "drop" (a tenth after two thirds).
        weight_decay: of matrices; vectors (biases, norms) are not decayed.
        betas: AdamW's.
        clip_norm: the norm that the gradient of all parameters together is scaled down to; None: not clipped.
        validation_bytes: bytes that are kept for validation, at the corpus' end or in its official part.
        eval_every: steps between validations; None: five times, evenly over the training bytes. The last step always
            ends with one.
        save_every: steps between snapshots; None: one a minute. One more when the run ends or is interrupted.
        seed: decides the parameters, the order of the windows and every random draw.
    """

    model: PerformerConfig
    task: Literal["text", "copying"] = "text"
    length: int
    first_length: int = 0
    batch: int = 1
    accumulate: int = 1
    windows: Order = "shuffled"
    method: Method = "chunked"
    chunk: int
    schedule: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    steps: int
    learning_rate: float
    warmup: float = 0.05
    decay: Literal["cosine", "constant", "drop"] = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = 1.0
    validation_bytes: int = 32_768
    eval_every: int | None = None
    save_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {
            "length": 2, "chunk": 1, "steps": 1, "batch": 1, "accumulate": 1, "validation_bytes": 2, "eval_every": 1,
            "save_every": 1,
        }.items():  # fmt: skip
            _require(self, name, getattr(self, name) is None or getattr(self, name) >= least, f"at least {least}")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            allowed = "a positive number" + (", or none" if name == "clip_norm" else "")
            _require(self, name, value is None or 0 < value < math.inf, allowed)
        _require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "zero or more")
        _require(self, "warmup", 0 <= self.warmup <= 1, "a fraction between 0 and 1")
        _require(self, "first_length", self.first_length == 0 or self.first_length >= 2, "0, or at least 2")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        _require(self, "seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        for name, choices in CHOICES.items():
            _require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        if self.task == "copying":
            fits = self.length >= 4 and self.length % 2 == 0 and self.windows != "documents"
            _require(self, "length", fits, "an even number of at least 4 for copying, and no documents")
        parse_schedule(self.schedule)

    def step_lengths(self) -> list[int]:
        """Bytes of each step's sequences, never falling; the last step has `length`.

        Early in training many small steps teach more than few large ones, and late it is the other way round. Whole
        documents have lengths of their own: there every step counts alike, as `length`.
        """
        if self.windows == "documents" or self.task == "copying":
            return [self.length] * self.steps
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

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> TrainConfig:
        """What `to_dict` gave.

        Raises:
            InputError: a field is missing, unknown or of the wrong type, or its number makes no sense.
        """
        unknown = set(fields) - {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown:
            raise InputError(f"configuration: unknown fields {', '.join(sorted(unknown))}")
        try:
            return TypeAdapter(TrainConfig).validate_json(json.dumps(fields))
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {_reason(e)}" for e in error.errors()]
            raise InputError(f"configuration: {'; '.join(w.removeprefix(': ') for w in wrong)}") from error

    def replace(self, **overrides: Any) -> TrainConfig:
        """The same run with other numbers. Those that are None stay as they are."""
        return dataclasses.replace(self, **{k: v for k, v in overrides.items() if v is not None})


CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("text", "copying"),
    "windows": ("shuffled", "consecutive", "random", "documents"),
    "method": METHODS,
    "device": DEVICES,
    "precision": ("float32", "bf16"),
    "decay": ("cosine", "constant", "drop"),
}


def config_for(preset: Preset, **overrides: Any) -> TrainConfig:
    """The run that a preset stands for. Overrides that are None leave the preset's number.

    A chunk longer than the sequence is one chunk, as everywhere in slimgrad.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    fields = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}
    return TrainConfig(**(fields | given))


def with_settings(config: TrainConfig, settings: Iterable[str]) -> TrainConfig:
    """A configuration with fields set from "name=value", the model's as "model.name=value"; values as in JSON.

    Raises:
        InputError: not of that form, no such field, or a value that does not fit.
    """
    fields = config.to_dict()
    for setting in settings:
        name, equals, value = setting.partition("=")
        owner, known = (fields["model"], "model.") if name.startswith("model.") else (fields, "")
        field = name.removeprefix("model.")
        if not equals or field not in owner or name == "model":
            names = [*(n for n in fields if n != "model"), *(f"model.{n}" for n in fields["model"])]
            raise InputError(f"--set {setting}: expected {known}NAME=VALUE with one of the names {', '.join(names)}")
        owner[field] = _parse(value)
    return TrainConfig.from_dict(fields)


def _parse(value: str) -> Any:
    """As JSON where it is JSON ("none" too), else the words as they stand."""
    try:
        return None if value.lower() == "none" else json.loads(value)
    except json.JSONDecodeError:
        return value


def _reason(error: Any) -> str:
    """pydantic's reason in one line, without the value's whole dictionary."""
    return str(error["msg"]).removeprefix("Value error, ")


def _require(config: TrainConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name}={getattr(config, name)}: expected {expected}")
