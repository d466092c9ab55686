"""Options of the command line that are made of the fields of a run's configuration."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, cast

import typer

from slimgrad.bytelm.config import TrainConfig, describe, plain_type
from slimgrad.bytelm.presets import DEFAULT_PRESET, PRESETS
from slimgrad.models import PerformerConfig

NUMBERS = "numbers"


def with_numbers(defaults: Mapping[str, str | None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of these fields, in the place of its parameter `numbers`.

    Args:
        defaults: by the name of the field, its default in words; None: the configuration's, if no preset has another.
            The command receives in `numbers` the fields that were given.
    """

    def replaced(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name != NUMBERS:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            parameters += [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option_for(name, default)
                )
                for name, default in defaults.items()
            ]

        @functools.wraps(command)
        def called(**given: Any) -> None:
            numbers = {name: given.pop(name) for name in defaults}
            command(numbers={name: value for name, value in numbers.items() if value is not None}, **given)

        made = cast(Any, called)
        made.__signature__ = signature.replace(parameters=parameters)
        made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return replaced


def _option_for(name: str, default: str | None) -> Any:
    """The annotation of a parameter that is this field of the configuration, None where it was not given."""
    wanted: Any = plain_type(name)
    shown = default_of(name) if default is None else default
    return Annotated[wanted | None, typer.Option(help=describe(name), show_default=shown)]


def default_of(name: str) -> str | bool:
    """A field's default in words, for the help; False where its description says it."""
    default = TrainConfig.__dataclass_fields__[name].default
    if any(getattr(preset, name) != default for preset in PRESETS.values()):
        return f"the preset's, of {DEFAULT_PRESET} {getattr(PRESETS[DEFAULT_PRESET], name)}"
    return False if default is None else str(default)


def further_names(options: Iterable[str]) -> list[str]:
    """The fields that `--set` alone sets, the model's as it names them."""
    shape = [f"model.{field.name}" for field in dataclasses.fields(PerformerConfig)]
    own = [field.name for field in dataclasses.fields(TrainConfig)]
    return [name for name in own if name not in {*options, "model", "length", "parts"}] + shape
