"""What `slimgrad train` and `slimgrad finetune` of a run were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimgrad.errors import InputError

ALL = "all"  # of --length: the whole training text as one sequence
HOW = ("method", "chunk", "memory", "schedule", "device")  # decide how a gradient is computed, not which gradient


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line was given; None where it was not."""

    corpus: str | None = None
    preset: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of the configuration that were given
    settings: tuple[str, ...] = ()
    config: Path | None = None
    init: Path | None = None
    resume: Path | None = None
    out: Path | None = None
    data_dir: Path | None = None
    log: str | None = None
    compare: bool = True
    written: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of the configuration from a file

    @property
    def named(self) -> set[str]:
        """The fields that were given in any way."""
        return {*self.numbers, *self.written, *(setting.partition("=")[0] for setting in self.settings)}

    @property
    def takes_all(self) -> bool:
        """Whether the whole text is one sequence."""
        if any(setting.startswith("length=") for setting in self.settings):
            return False
        return self.numbers.get("length", self.written.get("length")) == ALL


def require_one_dial(options: Options) -> None:
    """Refuse a chunk and a budget, which would choose another one; and one number by two names."""
    twice = sorted({*options.numbers} & {setting.partition("=")[0] for setting in options.settings})
    if twice:
        raise InputError(f"{flag(twice[0])} and --set {twice[0]}=...: expected one of them")
    if {"chunk", "memory"} <= options.named:
        raise InputError(
            "--chunk and --memory: expected one of them. --memory chooses the chunk; slimgrad plan --chunk shows what "
            "another one would take"
        )


def without_all(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without `--length all`, which is a number only once the text is known."""
    return {name: value for name, value in fields.items() if (name, value) != ("length", ALL)}


def flag(name: str) -> str:
    """The option that gives a field."""
    return "--set" if name == "settings" else "--" + name.replace("_", "-")
