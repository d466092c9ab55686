"""`slimgrad train` and `slimgrad finetune`: from options to a new run; `session` then carries it out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from torch import Tensor

from slimgrad.budget.plan import Plan
from slimgrad.bytelm import RunFolder, TrainConfig, build_model, make_task, open_model, with_fields, with_settings
from slimgrad.bytelm.memory import out_of_memory
from slimgrad.bytelm.model_file import require_shape
from slimgrad.bytelm.optimizer import check_optimizer
from slimgrad.bytelm.planned import as_planned
from slimgrad.bytelm.presets import DEFAULT_PRESET, get_preset
from slimgrad.cli.budgeted import keep_within, plan_visibly
from slimgrad.cli.options import HOW, Options, require_one_dial, without_all
from slimgrad.cli.session import Session, describe
from slimgrad.cli.texts import COPYING, fit_text, identify_text, is_path, load_text
from slimgrad.cli.trackers import require_tracker
from slimgrad.data import SPREAD
from slimgrad.errors import InputError
from slimgrad.models import Performer
from slimgrad.runs.environment import describe_environment
from slimgrad.runs.folder import require_new
from slimgrad.sweep.schedules.names import require_folder

FINETUNE_STEPS, FINETUNE_RATE = 20, 0.1


def run_training(options: Options) -> None:
    """Train a new run."""
    written = {} if options.config is None else _read_config_file(options.config)
    of_file = {name: written.pop(name, None) for name in ("preset", "corpus")}
    named = options.preset or of_file["preset"]
    preset = named or DEFAULT_PRESET
    options = dataclasses.replace(
        options, corpus=of_file["corpus"] if options.corpus is None else options.corpus, written=written
    )
    if options.init is None:
        weights, config, origin = None, get_preset(preset), f"preset {preset}"
    else:
        weights, config = _initial(options.init, named)
        origin = str(options.init) + (f", preset {preset}" if named else "")
    if options.config is not None:
        origin += f", {options.config}"
    _begin(options, config, weights, origin)


def run_finetuning(options: Options, run: Path) -> None:
    """Adapt a trained model to a text, in a new run."""
    weights, config = _initial(run, None)
    config = config.replace(
        first_length=0, steps=FINETUNE_STEPS, learning_rate=config.learning_rate * FINETUNE_RATE, windows="shuffled",
        warmup=0.1, task="text",
    )  # fmt: skip
    with out_of_memory("fine-tuning", options.numbers.get("chunk", config.chunk)):
        _begin(options, config, weights, str(run), finetuning=True)


def _begin(
    options: Options,
    config: TrainConfig,
    weights: Mapping[str, Tensor] | None,
    origin: str,
    *,
    finetuning: bool = False,
) -> None:
    shape = config.model
    try:
        config = with_fields(config, without_all(options.written))
    except InputError as error:
        raise InputError(f"--config {options.config}: {error}") from error
    config = with_settings(config.replace(**without_all(options.numbers)), options.settings)
    if "field" in options.named and "format" not in options.named:
        config = config.replace(format="jsonl")
    if {"field", "format"} & options.named and "fold_case" not in options.named:
        config = config.replace(fold_case=False)
    if is_path(config.validation):
        config = config.replace(validation=os.path.abspath(config.validation))  # a run may go on from elsewhere
    require_one_dial(options)
    keep_within(config.memory, config.device, has_plan=config.method == "chunked")
    if options.corpus == COPYING and config.task != COPYING:
        config = config.replace(task=COPYING, first_length=0)
    if weights is not None:
        require_shape(config.model, shape, Path(origin))
    corpus = load_text(options.corpus, config, options.data_dir)
    config = fit_text(config, corpus, options)
    task = make_task(config, corpus)
    require_folder(config.schedule)
    check_optimizer(config)
    if options.log is not None:
        require_tracker(options.log)
    if options.out is not None:
        require_new(options.out)
    asked, plan = config.schedule, plan_visibly(config)
    config = as_planned(config, plan)
    settings = describe(config, corpus, origin, plan)
    text = identify_text(corpus, options)
    record = {
        "settings": settings,
        "corpus": text and dataclasses.asdict(text),
        "origin": origin,
        "config": config.to_dict(),
        **plan_record(plan, asked),
        "sessions": [session_record(config, 0)],
    }
    name = COPYING if corpus is None else corpus.name
    with RunFolder.create(options.out, name, record, _with_weights(config, weights)) as folder:
        Session(
            config, corpus, task, folder, plan=plan, log=options.log, finetuning=finetuning,
            compare=options.compare,
        ).run(settings)  # fmt: skip


def _with_weights(config: TrainConfig, weights: Mapping[str, Tensor] | None) -> Performer | None:
    """The model to begin with, where the configuration does not tell."""
    if weights is None:
        return None
    model = build_model(config)
    model.load_state_dict(weights)
    return model


def _initial(path: Path, preset: str | None) -> tuple[dict[str, Tensor], TrainConfig]:
    """A model's parameters, and the configuration to begin with: the preset's, or that of the run it comes from."""
    model, config = open_model(path)
    if preset is not None:
        config = get_preset(preset)
        require_shape(config.model, model.config, path)
    if config is None:
        raise InputError(
            f"{path} is a model without a run, which has no numbers to train with. Name a run's folder, or take those "
            f"of a preset: slimgrad train CORPUS --init {path} --preset {DEFAULT_PRESET}"
        )
    of_its_own = is_path(config.validation)  # which is of another text
    config = dataclasses.replace(
        config, model=model.config, method="chunked", schedule="auto", memory=None, parts=(),
        validation=SPREAD if of_its_own else config.validation,
    )  # fmt: skip
    return model.state_dict(), config


def plan_record(plan: Plan | None, asked: str) -> dict[str, Any]:
    """A plan for config.json, and the schedule that was asked for, since the plan's own is in the configuration."""
    return {} if plan is None else {"plan": plan.to_dict(), "asked_schedule": asked}


def session_record(config: TrainConfig, step: int) -> dict[str, Any]:
    """What a session is, for config.json: from which step on, how gradients are computed, on what."""
    how = {name: getattr(config, name) for name in HOW}
    return {"after_step": step, **how, **describe_environment()}


def _read_config_file(path: Path) -> dict[str, Any]:
    """The fields that a YAML (or JSON) file sets: any of them, the model's below `model`; and `preset`, `corpus`.

    Raises:
        InputError: not such a file, or a field that there is none of.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise InputError(f"--config {path}: expected a readable YAML file, got: {reason}") from error
    if not isinstance(found, dict):
        raise InputError(f"--config {path}: expected lines such as 'steps: 400', found none")
    names = ["preset", "corpus", *(field.name for field in dataclasses.fields(TrainConfig))]
    fields = cast("dict[Any, Any]", found)
    unknown = [str(name) for name in fields if name not in names]
    if unknown:
        raise InputError(
            f"--config {path}: no field is called {', '.join(unknown)}. Expected any of {', '.join(names)}"
        )
    words = [name for name in ("preset", "corpus") if not isinstance(fields.get(name, ""), str)]
    if words:
        raise InputError(f"--config {path}: {words[0]}={fields[words[0]]}: expected a name")
    try:
        return json.loads(json.dumps(fields))
    except TypeError as error:
        raise InputError(f"--config {path}: expected numbers and words, got what is neither: {error}") from error
