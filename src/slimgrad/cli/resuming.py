"""`slimgrad train --resume`: a run goes on where it was, or after its end with more steps."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from slimgrad.budget.available import use_malloc
from slimgrad.budget.plan import Plan
from slimgrad.bytelm import RunFolder, TrainConfig, make_task, pick_device
from slimgrad.bytelm.folder import read_record
from slimgrad.bytelm.journalled import saved_gradient
from slimgrad.bytelm.planned import as_planned
from slimgrad.cli.budgeted import keep_within, plan_visibly
from slimgrad.cli.options import HOW, Options, flag, require_one_dial
from slimgrad.cli.session import Session, describe
from slimgrad.cli.texts import identify_text, load_text, recorded_text, require_same_text, where_it_was
from slimgrad.cli.trackers import require_tracker
from slimgrad.cli.training import plan_record, session_record
from slimgrad.errors import InputError
from slimgrad.runs.environment import describe_environment
from slimgrad.runs.folder import SNAPSHOTS, latest_snapshot, split_snapshot_path
from slimgrad.runs.snapshot import list_snapshots, step_of
from slimgrad.sweep.schedules.names import require_folder


def resume_training(options: Options) -> None:
    """Go on with a run; until its folder is opened, nothing of it is changed."""
    assert options.resume is not None
    allowed = {"resume", "corpus", "validation", "data_dir", "log", "compare", *HOW}
    given = {**options.numbers, **vars(options)}
    del given["numbers"], given["written"]
    if "steps" in options.numbers:  # more of them, after its end
        allowed |= {"steps", "learning_rate", "decay"}
    refused = [name for name, value in given.items() if name not in allowed and value not in (None, ())]
    if refused:
        raise InputError(
            f"--resume goes on with the run as it was: expected no {', no '.join(map(flag, refused))}. Only how "
            "gradients are computed may change: --method, --chunk, --memory, --schedule, --device; and --steps goes on "
            "after its end, with a --learning-rate. For anything else, begin a new run with --init"
        )
    record = read_record(split_snapshot_path(options.resume)[0])
    if not isinstance(record.get("sessions", []), list):
        raise InputError(
            f"{options.resume}: expected a list of sessions in config.json, found {record['sessions']!r:.99}. Remove it"
        )
    require_one_dial(options)
    config, plan = _as_before(record, options)
    _require_steps(config, options.resume)
    if "steps" in options.numbers:
        config = _with_another_part(config, options)
    if "validation" in options.numbers:  # the same bytes elsewhere, as the corpus may be
        config = dataclasses.replace(config, validation=os.path.abspath(options.numbers["validation"]))
    asked = config.schedule
    pick_device(config.device)
    keep_within(config.memory, config.device, has_plan=config.method == "chunked")
    require_folder(config.schedule)
    if options.log is not None:
        require_tracker(options.log)
    recorded = recorded_text(record, config, options)
    source, data_dir = where_it_was(recorded, options)
    corpus = load_text(source, config, data_dir)
    found = identify_text(corpus, options)
    require_same_text(recorded, found, source, config.validation)
    task = make_task(config, corpus)
    if plan is None:
        plan = plan_visibly(config)
    else:
        use_malloc(plan.malloc)
    config = as_planned(config, plan)
    with RunFolder.reopen(options.resume) as folder:  # from here on the run changes: nothing may be refused any more
        warnings = [*_tell_edits(folder), *_restore_environment(folder)]
        step = folder.snapshot.step if folder.snapshot else 0
        under_way: list[str] = []
        if saved_gradient(folder.path, step + 1) is not None:
            under_way = [f"the gradient of step {step + 1:,} from where it was saved, with its own chunk and schedule"]
        folder.record["config"] = config.to_dict()
        for name in ("plan", "asked_schedule"):
            folder.record.pop(name, None)
        folder.record |= plan_record(plan, asked)
        if recorded is None:
            folder.record["corpus"] = found and dataclasses.asdict(found)
        folder.record.setdefault("sessions", []).append(session_record(config, step))
        folder.save_record()
        settings = describe(config, corpus, folder.record.get("origin", "its own shape"), plan)
        settings["resumed"] = "; ".join([f"after step {step:,} of {config.steps:,}", *under_way, *warnings])
        Session(
            config, corpus, task, folder, plan=plan, log=options.log, compare=options.compare
        ).run(settings)  # fmt: skip


def _as_before(record: dict[str, Any], options: Options) -> tuple[TrainConfig, Plan | None]:
    """A run's configuration, with what is named now, as it was asked for; and its plan, where that still holds."""
    config = TrainConfig.from_dict(record["config"])
    config = config.replace(schedule=record.get("asked_schedule"))
    if "chunk" in options.numbers:
        config = dataclasses.replace(config, memory=None)
    config = config.replace(**{name: value for name, value in options.numbers.items() if name in HOW})
    if "plan" not in record or not options.numbers.keys().isdisjoint(HOW):
        return config, None
    return config, Plan.from_dict(record["plan"])


def _with_another_part(config: TrainConfig, options: Options) -> TrainConfig:
    """A run that is at its end with more steps after it: the moments stay, the learning rate begins anew."""
    assert options.resume is not None
    more, rate = options.numbers["steps"], options.numbers.get("learning_rate")
    folder, named = split_snapshot_path(options.resume)
    if more < 1:
        raise InputError(f"--steps {more}: expected at least 1")
    snapshot = latest_snapshot(folder)
    step = 0 if snapshot is None else snapshot.step
    if named is not None:
        raise InputError(f"--steps {more} with --resume {named}: expected the run's folder, {folder}, got a snapshot")
    if step < config.steps:
        raise InputError(
            f"--steps {more} with --resume {folder}: expected a run at its end, this one is after step {step:,} of "
            f"{config.steps:,}. First: slimgrad train --resume {folder}"
        )
    if rate is None and config.decay != "constant":
        raise InputError(
            f"--steps {more} with --resume: expected a --learning-rate, since that of the run has come down "
            f"({config.decay}) from {config.learning_rate:g}"
        )
    numbers = {name: options.numbers[name] for name in ("learning_rate", "decay") if name in options.numbers}
    parts, steps = (*config.parts, config.part_at(config.steps - 1)[1]), config.steps + more
    return dataclasses.replace(config, steps=steps, parts=parts, warmup=0.0, **numbers)


def _require_steps(config: TrainConfig, path: Path) -> None:
    """Refuse a record that was edited to fewer steps than are done."""
    folder, named = split_snapshot_path(path)
    for snapshot in [named] if named else list_snapshots(folder / SNAPSHOTS)[:1]:
        done = step_of(snapshot)
        if done > config.steps:
            raise InputError(
                f"{folder}: expected in config.json at least the {done:,} steps that are done, found {config.steps:,}"
            )


def _tell_edits(folder: RunFolder) -> list[str]:
    """Numbers of config.json that are not those of the latest snapshot, but for those that may change on the way."""
    before, now = folder.snapshot.noted.get("config", {}) if folder.snapshot else {}, folder.record["config"]
    changing = {*HOW, "validation"}
    if before.get("parts") != now.get("parts"):
        changing |= {"parts", "steps", "learning_rate", "warmup", "decay"}
    edits = [
        f"{name} {before[name]} is now {now.get(name)}"
        for name in before
        if name not in changing and before[name] != now.get(name)
    ]
    return [f"config.json was edited, this is another run from here on: {', '.join(edits)}"] if edits else []


def _restore_environment(folder: RunFolder) -> list[str]:
    """Compute with as many threads as before; say what else differs, where bits can no longer be promised."""
    before = dict(folder.snapshot.environment) if folder.snapshot else {}
    if before:
        torch.set_num_threads(before["threads"])
    now = describe_environment()
    differing = [f"{name} {before[name]} is now {now[name]}" for name in before if before[name] != now.get(name)]
    return [f"bits may differ from an undisturbed run: {', '.join(differing)}"] if differing else []
