"""`slimgrad train` and `slimgrad finetune`: from options to a run; `session` then carries it out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimgrad.budget.available import use_malloc
from slimgrad.budget.plan import Plan
from slimgrad.bytelm import (
    RunFolder,
    TrainConfig,
    build_model,
    make_task,
    open_model,
    pick_device,
    with_settings,
)
from slimgrad.bytelm.folder import read_record
from slimgrad.bytelm.journalled import saved_gradient
from slimgrad.bytelm.memory import out_of_memory
from slimgrad.bytelm.model_file import require_shape
from slimgrad.bytelm.planned import as_planned
from slimgrad.bytelm.presets import get_preset
from slimgrad.cli.budgeted import keep_within, plan_visibly
from slimgrad.cli.session import Session, describe
from slimgrad.data import KNOWN, Corpus, load_corpus
from slimgrad.errors import InputError
from slimgrad.extras import require_extra
from slimgrad.models import Performer
from slimgrad.runs.environment import describe_environment
from slimgrad.runs.folder import require_new, split_snapshot_path
from slimgrad.sweep.schedules.names import require_folder

COPYING = "copying"
ALL = "all"  # of --length: the whole training text as one sequence
DEFAULT_PRESET = "modern"
_BYTES = 256
FINETUNE_STEPS, FINETUNE_RATE = 20, 0.1
_HOW = ("method", "chunk", "memory", "schedule", "device")  # decide how a gradient is computed, not which gradient


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line was given; None where it was not."""

    corpus: str | None = None
    preset: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of the configuration that were given
    settings: tuple[str, ...] = ()
    init: Path | None = None
    resume: Path | None = None
    out: Path | None = None
    data_dir: Path | None = None
    tensorboard: bool = False
    compare: bool = True


def run_training(options: Options) -> None:
    """Train a new run, or go on with one."""
    if options.resume is not None:
        _resume(options)
        return
    preset = options.preset or DEFAULT_PRESET
    if options.init is None:
        weights, config, origin = None, get_preset(preset), f"preset {preset}"
    else:
        weights, config = _initial(options.init, options.preset)
        origin = str(options.init) + (f", preset {preset}" if options.preset else "")
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
    numbers = {name: value for name, value in options.numbers.items() if (name, value) != ("length", ALL)}
    config = with_settings(config.replace(**numbers), options.settings)
    _require_one_dial(options)
    keep_within(config.memory, config.device, has_plan=config.method == "chunked")
    if options.corpus == COPYING and config.task != COPYING:
        config = config.replace(task=COPYING, first_length=0)
    if weights is not None:
        require_shape(config.model, shape, Path(origin))
    corpus = _load(options.corpus, config, options.data_dir)
    config = _fit(config, corpus, options)
    task = make_task(config, corpus)
    require_folder(config.schedule)
    if options.tensorboard:
        require_extra("tensorboard", "--tensorboard")
    if options.out is not None:
        require_new(options.out)
    asked, plan = config.schedule, plan_visibly(config)
    config = as_planned(config, plan)
    settings = describe(config, corpus, origin, plan)
    record = {
        "settings": settings,
        "corpus": _identify(corpus, options),
        "origin": origin,
        "config": config.to_dict(),
        **_as_record(plan, asked),
        "sessions": [_session(config, 0)],
    }
    name = COPYING if corpus is None else corpus.name
    with RunFolder.create(options.out, name, record, _with_weights(config, weights)) as folder:
        Session(
            config, corpus, task, folder, plan=plan, tensorboard=options.tensorboard, finetuning=finetuning,
            compare=options.compare,
        ).run(settings)  # fmt: skip


def _with_weights(config: TrainConfig, weights: Mapping[str, Tensor] | None) -> Performer | None:
    """The model to begin with, where the configuration does not tell."""
    if weights is None:
        return None
    model = build_model(config)
    model.load_state_dict(weights)
    return model


def _require_one_dial(options: Options) -> None:
    """Refuse a chunk and a budget, which would choose another one; and one number by two names."""
    twice = sorted({*options.numbers} & {setting.partition("=")[0] for setting in options.settings})
    if twice:
        raise InputError(f"{_flag(twice[0])} and --set {twice[0]}=...: expected one of them")
    named = {*options.numbers, *(setting.partition("=")[0] for setting in options.settings)}
    if {"chunk", "memory"} <= named:
        raise InputError(
            "--chunk and --memory: expected one of them. --memory chooses the chunk; slimgrad plan --chunk shows what "
            "another one would take"
        )


def _as_record(plan: Plan | None, asked: str) -> dict[str, Any]:
    """A plan for config.json, and the schedule that was asked for, since the plan's own is in the configuration."""
    return {} if plan is None else {"plan": plan.to_dict(), "asked_schedule": asked}


def _resume(options: Options) -> None:
    assert options.resume is not None
    allowed = {"resume", "corpus", "data_dir", "tensorboard", "compare", *_HOW}
    given = {**options.numbers, **vars(options)}
    given.pop("numbers")
    refused = [name for name, value in given.items() if name not in allowed and value not in (None, ())]
    if refused:
        raise InputError(
            f"--resume goes on with the run as it was: expected no {', no '.join(map(_flag, refused))}. Only how "
            "gradients are computed may change: --method, --chunk, --memory, --schedule, --device. For anything else, "
            "begin a new run with --init"
        )
    record = read_record(split_snapshot_path(options.resume)[0])
    _require_one_dial(options)
    config, plan = _as_before(record, options)
    asked = config.schedule
    pick_device(config.device)
    keep_within(config.memory, config.device, has_plan=config.method == "chunked")
    require_folder(config.schedule)
    if options.tensorboard:
        require_extra("tensorboard", "--tensorboard")
    source, data_dir = _where(record, config, options)
    corpus = _load(source, config, data_dir)
    _require_same(record.get("corpus"), _identify(corpus, options), source)
    task = make_task(config, corpus)
    if plan is None:
        plan = plan_visibly(config)
    else:
        use_malloc(plan.malloc)
    config = as_planned(config, plan)
    with RunFolder.reopen(options.resume) as folder:  # from here on the run changes: nothing may be refused any more
        warnings = _restore_environment(folder)
        step = folder.snapshot.step if folder.snapshot else 0
        under_way: list[str] = []
        if saved_gradient(folder.path, step + 1) is not None:
            under_way = [f"the gradient of step {step + 1:,} from where it was saved, with its own chunk and schedule"]
        folder.record["config"] = config.to_dict()
        for name in ("plan", "asked_schedule"):
            folder.record.pop(name, None)
        folder.record |= _as_record(plan, asked)
        folder.record.setdefault("sessions", []).append(_session(config, step))
        folder.save_record()
        settings = describe(config, corpus, folder.record.get("origin", "its own shape"), plan)
        settings["resumed"] = "; ".join([f"after step {step:,} of {config.steps:,}", *under_way, *warnings])
        Session(
            config, corpus, task, folder, plan=plan, tensorboard=options.tensorboard, compare=options.compare
        ).run(settings)  # fmt: skip


def _as_before(record: dict[str, Any], options: Options) -> tuple[TrainConfig, Plan | None]:
    """A run's configuration, with what is named now, as it was asked for; and its plan, where that still holds."""
    config = TrainConfig.from_dict(record["config"])
    config = config.replace(schedule=record.get("asked_schedule"))
    if "chunk" in options.numbers:
        config = dataclasses.replace(config, memory=None)
    config = config.replace(**options.numbers)
    if "plan" not in record or not options.numbers.keys().isdisjoint(_HOW):
        return config, None
    return config, Plan.from_dict(record["plan"])


def _where(record: dict[str, Any], config: TrainConfig, options: Options) -> tuple[str | None, Path | None]:
    """The corpus to go on with and where its files lie: as now named, or else as the run's record has them."""
    found = record.get("corpus")
    if "corpus" not in record and config.task != COPYING and options.corpus is None:
        raise InputError(
            f"{options.resume}: expected a record of the run's corpus, found none. Name the corpus: slimgrad train "
            "CORPUS --resume RUN"
        )
    data_dir = found["data_dir"] if found else None
    return options.corpus or (found["given"] if found else None), options.data_dir or (data_dir and Path(data_dir))


def _flag(name: str) -> str:
    return "--set" if name == "settings" else "--" + name.replace("_", "-")


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
    config = dataclasses.replace(config, model=model.config, method="chunked", schedule="auto", memory=None)
    return model.state_dict(), config


def _load(source: str | None, config: TrainConfig, data_dir: Path | None) -> Corpus | None:
    if config.task == COPYING:
        if source not in (None, COPYING):
            raise InputError(f"the copying task makes its own sequences: expected no corpus, got {source}")
        return None
    return load_corpus(source, data_dir=data_dir)


def _fit(config: TrainConfig, corpus: Corpus | None, options: Options) -> TrainConfig:
    """Numbers that follow from the corpus: bytes for validation, the longest of whole documents, or all there are."""
    takes_all = options.numbers.get("length") == ALL
    if corpus is not None and config.model.vocabulary < _BYTES:
        raise InputError(
            f"--set model.vocabulary={config.model.vocabulary}: expected {_BYTES} at least, a text is bytes"
        )
    if corpus is None:
        if takes_all:
            raise InputError(f"--length {ALL}: expected a text, the copying task has none. Name a number of symbols")
        return config
    if not any(setting.startswith("validation_bytes=") for setting in options.settings):
        config = config.replace(validation_bytes=validation_bytes(corpus))
    if config.windows == "documents":
        if "length" in options.numbers:
            raise InputError(
                f"--length {options.numbers['length']}: expected none with --windows documents, which have their own"
            )
        train, _ = corpus.split(validation_bytes=config.validation_bytes, window=2)
        config = config.replace(length=max(2, *(len(document) for document in train.documents)))
    if takes_all:
        if config.batch * config.accumulate > 1:
            raise InputError(
                f"--length {ALL} makes one sequence of the text: expected --batch 1 and --accumulate 1, got "
                f"{config.batch} and {config.accumulate}, which would be the same sequence over again"
            )
        train, _ = corpus.split(validation_bytes=config.validation_bytes, window=2)
        config = config.replace(length=len(train), first_length=0)
    return config


def validation_bytes(corpus: Corpus) -> int:
    """32,768 bytes; where they are cut off the text, at most a tenth of it."""
    return 32_768 if corpus.validation else max(2, min(32_768, len(corpus.text) // 10))


def _identify(corpus: Corpus | None, options: Options) -> dict[str, Any] | None:
    """The corpus' bytes by their checksum, and where they were found."""
    if corpus is None:
        return None
    given = options.corpus
    if given is not None and given not in KNOWN:
        given = os.path.abspath(given)  # a run may go on from another working directory
    parts = [corpus.text] + ([corpus.validation] if corpus.validation else [])
    return {
        "name": corpus.name,
        "given": given,
        "data_dir": options.data_dir and os.path.abspath(options.data_dir),
        "bytes": [len(part) for part in parts],
        "sha256": [part.sha256() for part in parts],
    }


def _require_same(before: dict[str, Any] | None, now: dict[str, Any] | None, source: str | None) -> None:
    if before is None or now is None:
        return
    if before["sha256"] != now["sha256"]:
        raise InputError(
            f"corpus {source or before['name']}: expected the {sum(before['bytes']):,} bytes that the run began with, "
            f"found {sum(now['bytes']):,} bytes, and other ones. Name the file or folder that holds the former: "
            "slimgrad train CORPUS --resume RUN"
        )


def _session(config: TrainConfig, step: int) -> dict[str, Any]:
    how = {name: getattr(config, name) for name in _HOW}
    return {"after_step": step, **how, **describe_environment()}


def _restore_environment(folder: RunFolder) -> list[str]:
    """Compute with as many threads as before; say what else differs, where bits can no longer be promised."""
    before = dict(folder.snapshot.environment) if folder.snapshot else {}
    if before:
        torch.set_num_threads(before["threads"])
    now = describe_environment()
    differing = [f"{name} {before[name]} is now {now[name]}" for name in before if before[name] != now[name]]
    return [f"bits may differ from an undisturbed run: {', '.join(differing)}"] if differing else []
