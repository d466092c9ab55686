"""What a training run is: every number of it, validated before anything runs, and saved with the run.

A field of `TrainConfig` is written once: its type, its default, what it may be and what it is for. The command line's
options, their help and the messages about what does not fit are made of it.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from slimgrad.budget.size import parse_bytes
from slimgrad.data.options import END, SPREAD, Format, Order, Reading
from slimgrad.errors import InputError
from slimgrad.models.shapes import PerformerConfig
from slimgrad.sweep.schedules.names import parse_schedule


def _explained(description: str, expected: str = "", **constraints: Any) -> Any:
    """A field: what it is for, what it may be in words ("" where one bound or a choice says it), and in numbers."""
    return Field(description=description, json_schema_extra={"expected": expected} if expected else None, **constraints)


_Fraction = Annotated[float, Field(ge=0, lt=1)]
Method = Literal["chunked", "checkpoint", "plain"]
Device = Literal["auto", "cpu", "cuda"]
Decay = Literal["cosine", "linear", "constant", "drop"]
DEFAULT_OPTIMIZER = "AdamW"
_BEFORE = {"validation": END}  # what runs did whose configuration does not say it


@dataclass(frozen=True, kw_only=True)
class Part:
    """The learning rate over a part of a run: up to step `steps`, counted from the run's first."""

    steps: int
    learning_rate: float
    warmup: float
    decay: Decay


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. What each field is for is said by `describe(name)`, which the help of the command line shows."""

    model: Annotated[PerformerConfig, _explained("The Performer's shape.")]
    task: Annotated[
        Literal["text", "copying"],
        _explained('"text" (the bytes of a corpus), or "copying" (generated: the paper\'s section 4.3).'),
    ] = "text"
    format: Annotated[
        Format,
        _explained(
            "What files hold: bytes (a file is a document), fasta (a record is one, without header and line breaks), "
            "or jsonl (a field of a line is one). Compressed files are decompressed once."
        ),
    ] = "bytes"
    field: Annotated[str, _explained("The field of JSON lines whose text is a document; with it, format is jsonl.")] = (
        "text"
    )
    fold_case: Annotated[bool, _explained("Of FASTA: small letters become capitals.")] = False
    validation: Annotated[
        str,
        _explained(
            "What is held out for validation: spread (stretches from all over the text), end (its last bytes), a share "
            "such as 0.05 (the end of each document), or a file or folder that is none of the text. Corpora with a "
            "name may have a part of their own."
        ),
    ] = SPREAD
    length: Annotated[
        int,
        _explained(
            "Bytes of one training sequence; of the longest, where they grow. On the command line all: the whole "
            "training text is one.",
            ge=2,
        ),
    ]
    first_length: Annotated[
        int,
        _explained(
            "Bytes of the first sequences; the length doubles until it is the full one, each having an equal share of "
            "the bytes. 0: all have the full length.",
            ge=0,
        ),
    ] = 0
    batch: Annotated[int, _explained("Sequences that go through the model at once.", ge=1)] = 1
    accumulate: Annotated[
        int, _explained("Batches whose gradients make one step; the mean is over all their targets.", ge=1)
    ] = 1
    windows: Annotated[
        Order,
        _explained(
            "Sequences from the text: shuffled (passes over consecutive windows, in random order), consecutive, random "
            "(from any byte on), or documents (whole ones, each at its own length)."
        ),
    ] = "shuffled"
    method: Annotated[
        Method,
        _explained(
            "How gradients are computed: chunked (in the memory of one chunk), checkpoint (each layer is computed "
            "twice) or plain. The gradient is the same."
        ),
    ] = "chunked"
    chunk: Annotated[
        int, _explained("Bytes whose graph lives at once: what decides the memory of chunked gradients.", ge=1)
    ]
    memory: Annotated[
        str | None,
        _explained(
            "What the process may hold, weights included, as 2GiB or 500MB: chunk and schedule are then chosen by "
            "measurements, as the fastest within it. Without it, or --chunk, the preset's chunk."
        ),
    ] = None
    schedule: Annotated[
        str,
        _explained("States to keep: auto, rebuild, keep, every:K or binomial:SLOTS; @disk or @FOLDER: there."),
    ] = "auto"
    device: Annotated[Device, _explained("cpu, cuda, or auto: the GPU where there is one.")] = "auto"
    precision: Annotated[
        Literal["float32", "bf16"], _explained("float32, or bf16: autocast, with parameters and states in float32.")
    ] = "float32"
    steps: Annotated[int, _explained("Optimiser steps.", ge=1)]
    parts: Annotated[tuple[Part, ...], _explained("Of a run that went on after its end, what was before.")] = ()
    optimizer: Annotated[
        str,
        _explained("The optimiser: any of torch.optim, with arguments after a colon: SGD:momentum=0.9,nesterov=true."),
    ] = DEFAULT_OPTIMIZER
    learning_rate: Annotated[
        float,
        _explained("The highest learning rate, after the warm-up.", "a positive number", gt=0, allow_inf_nan=False),
    ]
    warmup: Annotated[
        float,
        _explained(
            "Fraction of the training bytes over which the learning rate rises.",
            "a fraction between 0 and 1",
            ge=0,
            le=1,
        ),
    ] = 0.05
    decay: Annotated[
        Decay,
        _explained(
            "The learning rate after that: cosine (half a cosine, down to zero), linear (down to zero), constant, or "
            "drop (a tenth after two thirds)."
        ),
    ] = "cosine"
    weight_decay: Annotated[
        float,
        _explained(
            "AdamW's, of matrices; vectors (biases, norms) are not decayed.", "zero or more", ge=0, allow_inf_nan=False
        ),
    ] = 0.1
    betas: Annotated[tuple[_Fraction, _Fraction], _explained("AdamW's.", "two numbers in [0, 1)")] = (0.9, 0.95)
    clip_norm: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        _explained(
            "The norm that the gradient of all parameters together is scaled down to; none: not clipped.",
            "a positive number, or none",
        ),
    ] = 1.0
    validation_bytes: Annotated[
        int,
        _explained(
            "Bytes held out for validation, or those of its own part; by default 32,768, at most a tenth of the text, "
            "and all of a file that is named for it.",
            ge=2,
        ),
    ] = 32_768
    eval_every: Annotated[
        Annotated[int, Field(ge=1)] | None,
        _explained("Steps between validations; by default five, evenly over the bytes. The last step always has one."),
    ] = None
    save_every: Annotated[
        Annotated[int, Field(ge=1)] | None,
        _explained("Steps between snapshots; by default one a minute. One more when the run ends or is interrupted."),
    ] = None
    seed: Annotated[
        int,
        _explained(
            "Decides parameters, order and draws; one seed, one run.", "between 0 and 2**63 - 1", ge=0, lt=2**63
        ),
    ] = 0

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        try:
            _checked().model_validate(given, strict=True)
        except ValidationError as error:
            raise InputError(_said(error, given)) from error
        if self.first_length == 1:
            raise InputError("first_length=1: expected 0, or at least 2")
        if self.task == "copying" and (self.length < 4 or self.length % 2 or self.windows == "documents"):
            raise InputError(
                f"length={self.length}: expected an even number of at least 4 for copying, and no documents"
            )
        ends = [0, *(part.steps for part in self.parts), self.steps]
        if any(before >= after for before, after in itertools.pairwise(ends)):
            raise InputError(f"parts: expected rising numbers of steps below {self.steps}, got {ends[1:-1]}")
        if self.memory is not None:
            parse_bytes(self.memory)
        parse_schedule(self.schedule)

    @property
    def reading(self) -> Reading:
        """How files become documents. Raises `InputError` where its fields do not fit together."""
        return Reading(format=self.format, field=self.field, fold_case=self.fold_case)

    def part_at(self, step: int) -> tuple[int, Part]:
        """The part of the run to which the step after `step` others belongs, and the steps before that part."""
        now = Part(steps=self.steps, learning_rate=self.learning_rate, warmup=self.warmup, decay=self.decay)
        before = 0
        for part in (*self.parts, now):
            if step < part.steps:
                return before, part
            before = part.steps
        raise ValueError(f"step {step}: expected fewer than the run's {self.steps}")

    def step_lengths(self) -> list[int]:
        """Bytes of each step's sequences, never falling; the last step has `length`.

        Early in training many small steps teach more than few large ones, and late it is the other way round. Whole
        documents have lengths of their own: there every step counts alike, as `length`. Only the first of a run's
        parts has shorter ones.
        """
        if self.windows == "documents" or self.task == "copying":
            return [self.length] * self.steps
        lengths = [min(self.first_length or self.length, self.length)]
        while lengths[-1] < self.length:
            lengths.append(min(2 * lengths[-1], self.length))
        shares = [1 / length for length in lengths]
        first = self.parts[0].steps if self.parts else self.steps
        ends = [round(first * sum(shares[: i + 1]) / sum(shares)) for i in range(len(lengths))]
        by_step = (bisect.bisect_right(ends, step) for step in range(first - 1))
        return [*(lengths[index] for index in by_step), *([self.length] * (self.steps - first + 1))]

    def to_dict(self) -> dict[str, Any]:
        """Every number, nested as the dataclasses are; plain enough for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> TrainConfig:
        """What `to_dict` gave, now or in an earlier version.

        Raises:
            InputError: a field is missing, unknown or of the wrong type, or its number makes no sense.
        """
        unknown = set(fields) - {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown:
            raise InputError(f"configuration: unknown fields {', '.join(sorted(unknown))}")
        try:
            found = _checked().model_validate_json(json.dumps(_BEFORE | fields))
        except ValidationError as error:
            raise InputError(f"configuration: {_said(error, fields)}") from error
        return TrainConfig(**{name: getattr(found, name) for name in type(found).model_fields})

    def replace(self, **overrides: Any) -> TrainConfig:
        """The same run with other numbers. Those that are None stay as they are."""
        return dataclasses.replace(self, **{k: v for k, v in overrides.items() if v is not None})


def describe(name: str) -> str:
    """What a field of `TrainConfig` is for."""
    return _checked().model_fields[name].description or ""


def plain_type(name: str) -> type:
    """A field's type as a word on the command line is read: bool (a flag), int, float or str."""
    found = [one for one in (bool, int, float) if one in _members(_checked().model_fields[name].annotation)]
    return found[0] if found else str


def with_fields(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """A configuration with some fields set; of the model too only those that are named.

    Raises:
        InputError: no such field, or a value that does not fit.
    """
    fields = config.to_dict()
    model = given.get("model", {})
    unknown = set(model) - set(fields["model"]) if isinstance(model, dict) else {"model"}
    if unknown:
        raise InputError(f"model: expected any of {', '.join(fields['model'])}, got {', '.join(sorted(unknown))}")
    plain = {name: _fitting(name, value) for name, value in given.items()}
    return TrainConfig.from_dict({**fields, **plain, "model": fields["model"] | model})


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
        owner[field] = _parse(value) if known else _fitting(name, _parse(value))
    return TrainConfig.from_dict(fields)


@functools.cache
def _checked() -> type[BaseModel]:
    """The same fields for pydantic, which checks them."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    fields = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(TrainConfig)
    }
    made: Any = create_model
    return made("TrainConfig", **fields)


def _fitting(name: str, value: Any) -> Any:
    """A number that is given for a field of words is a word; and "none" is nothing."""
    if type(value) in (int, float) and name in _checked().model_fields and plain_type(name) is str:
        return str(value)
    return None if isinstance(value, str) and value.lower() == "none" else value


def _parse(value: str) -> Any:
    """As JSON where it is JSON ("none" too), else the words as they stand."""
    try:
        return None if value.lower() == "none" else json.loads(value)
    except json.JSONDecodeError:
        return value


def _said(error: ValidationError, given: dict[str, Any]) -> str:
    """Every field that does not fit: what it is and what was expected; of a wrong type, pydantic's own reason."""
    reasons: dict[str, str] = {}
    for one in error.errors():
        name = str(one["loc"][0])
        field = _checked().model_fields.get(name)
        within_model = len(one["loc"]) > 1 and isinstance(one["loc"][1], str)
        expected = "" if field is None or within_model else _expected(field, one)
        where = ".".join(map(str, one["loc"]))
        reason = f"{where}: {str(one['msg']).removeprefix('Value error, ')}"
        if expected:
            value = given[name]
            reason = f"{name}={float(value) if plain_type(name) is float and type(value) is int else value}: {expected}"
        reasons.setdefault(name, reason)
    return "; ".join(reasons.values())


def _expected(field: FieldInfo, error: Any) -> str:
    """What a number out of its bounds, or a word that is no choice, should have been; "" for other errors."""
    if error["type"] == "literal_error":
        return f"expected one of {', '.join(get_args(field.annotation))}"
    if error["type"] not in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        return ""
    extra = field.json_schema_extra
    words = extra.get("expected") if isinstance(extra, dict) else None
    return f"expected {words or 'at least ' + str(error['ctx']['ge'])}"


def _members(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without their constraints."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for one in get_args(annotation) for member in _members(one)]
    return [annotation]
