"""What a fine-tuning run was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from slimgrad.budget.size import parse_bytes
from slimgrad.errors import InputError
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.keep import Rebuild
from slimgrad.sweep.schedules.names import parse_schedule

ADAPTER_RATE, FULL_RATE = 2e-4, 2e-5
LOGGERS = ("none", "tensorboard", "trackio")
# decide how a gradient is computed, or what is told of it; not which gradient
HOW = ("chunk", "memory", "rows", "schedule", "gradient_checkpointing", "log", "save_every", "device")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run.

    Attributes:
        model: a folder, or a name that transformers fetches.
        data: a text file, a folder of them, JSONL, or a tokenised dataset.
        lora: the rank of the adapters; None: every weight is trained.
        lora_alpha: None: twice the rank.
        lora_dropout: on what enters the adapters.
        dora: weight-decomposed adapters.
        bits: 4: the frozen weights in NF4, through bitsandbytes.
        chunk: tokens whose graph lives at once; None: as the memory allows.
        memory: what the process may hold, as "8GiB"; None: what is free.
        rows: where keys and values are: "device" or "host".
        schedule: how states are found again, by name; "auto".
        learning_rate: the highest; None: 2e-4 for adapters, 2e-5 for every weight.
        epochs: times through the documents; None: 1, unless `steps` says otherwise.
        steps: of the optimiser.
        batch: documents at once, padded on the right.
        accumulate: batches whose gradients make one step.
        warmup: the share of the steps in which the learning rate rises.
        seed: decides adapters, order and dropout.
        dtype: "float32" or "bfloat16" of computation and frozen weights; None: what the model is saved in.
        gradient_checkpointing: transformers' own, inside chunks.
        eval: documents to evaluate on, before and after.
        eval_share: or that share of the documents.
        save_every: steps between checkpoints; None: about ten in all.
        log: "none", "tensorboard" or "trackio".
        device: "cpu", "cuda", or "auto": the GPU where there is one.
    """

    model: str
    data: str
    lora: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    dora: bool = False
    bits: int | None = None
    chunk: int | None = None
    memory: str | None = None
    rows: str = "device"
    schedule: str = "auto"
    learning_rate: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch: int = 1
    accumulate: int = 1
    warmup: float = 0.1
    seed: int = 0
    dtype: str | None = None
    gradient_checkpointing: bool = False
    eval: str | None = None
    eval_share: float | None = None
    save_every: int | None = None
    log: str = "none"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("lora", "lora_alpha", "chunk", "steps", "batch", "accumulate", "save_every"):
            _require(name, getattr(self, name), lambda x: x >= 1, "at least 1")
        _require("learning_rate", self.learning_rate, lambda x: 0 < x < float("inf"), "a number above 0")
        _require("epochs", self.epochs, lambda x: 0 < x < float("inf"), "a number above 0")
        for name in ("warmup", "lora_dropout"):
            _require(name, getattr(self, name), lambda x: 0 <= x < 1, "a share from 0 to below 1")
        _require("eval_share", self.eval_share, lambda x: 0 < x < 1, "a share between 0 and 1")
        _require("bits", self.bits, lambda x: x == 4, "4")
        for name, known in (
            ("rows", ("device", "host")), ("dtype", ("float32", "bfloat16")), ("log", LOGGERS),
            ("device", ("auto", "cpu", "cuda")),
        ):  # fmt: skip
            _require(name, getattr(self, name), known.__contains__, f"one of {', '.join(known)}")
        self._refuse_what_excludes()
        self.made_schedule()

    def _refuse_what_excludes(self) -> None:
        if self.lora is None:
            given = [n for n in ("lora_alpha", "lora_dropout", "dora") if getattr(self, n)]
            if given:
                raise InputError(f"{flag(given[0])}: expected --lora RANK with it")
            if self.bits:
                raise InputError("--bits 4: four bits cannot be trained themselves; expected --lora RANK with it")
        if self.chunk is not None and self.memory is not None:
            raise InputError("--chunk and --memory: expected one of them. --memory chooses the chunk")
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.epochs is not None and self.steps is not None:
            raise InputError("--epochs and --steps: expected one of them")
        if self.eval is not None and self.eval_share is not None:
            raise InputError("--eval and --eval-share: expected one of them")

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or (FULL_RATE if self.lora is None else ADAPTER_RATE)

    @property
    def alpha(self) -> int:
        """What the adapters' product is scaled by, times the rank."""
        return self.lora_alpha or 2 * (self.lora or 0)

    def made_schedule(self) -> Schedule | None:
        """The schedule of states as a value; None: slimgrad's choice."""
        schedule = parse_schedule(self.schedule)
        return schedule if self.rows == "device" else replace(schedule or Rebuild(), rows=self.rows)

    def going_on(self, given: dict[str, Any]) -> Settings:
        """These settings, for a run that is taken up again with what the command was given.

        Raises:
            InputError: something was given that would make it another run.
        """
        before = asdict(self)
        changed = [name for name, x in given.items() if name not in HOW and before[name] != x]
        if changed:
            name = changed[0]
            raise InputError(
                f"{flag(name)} {given[name]}: the run began with {before[name]}, and --resume goes on with it as it "
                f"was. Leave it out (only {', '.join(flag(n) for n in HOW)} may change), or begin a new run"
            )
        dials: dict[str, Any] = dict.fromkeys({"chunk", "memory"} if {"chunk", "memory"} & given.keys() else ())
        return replace(self, **dials | {name: x for name, x in given.items() if name in HOW})

    def to_dict(self) -> dict[str, Any]:
        """For a run's record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Settings:
        """From a run's record."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: x for name, x in record.items() if name in known})


def flag(name: str) -> str:
    """As the command line has it."""
    return name.upper() if name in ("model", "data") else "--" + name.replace("_", "-")


def _require(name: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    if value is not None and not fits(value):
        raise InputError(f"{flag(name)} {value}: expected {expected}")


def as_given(path: str) -> str:
    """A path that means the same from another working directory; a name stays."""
    return str(Path(path).resolve()) if Path(path).exists() else path
