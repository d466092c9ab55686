"""`slimgrad finetune` and `slimgrad verify`: of a Hugging Face model, or of a run of ours; which of them a path is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from slimgrad.cli.options import Options
from slimgrad.cli.training import run_finetuning
from slimgrad.errors import InputError
from slimgrad.runs.folder import CONFIG, split_snapshot_path

OF_RUNS = ("length", "method", "settings", "data_dir")
# of a run's configuration
NUMBERS = ("length", "chunk", "memory", "method", "device", "learning_rate", "steps", "seed")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # of a model that transformers fetches


def run_finetune(model: str | None, data: str | None, *, resume: Path | None, out: Path | None, **given: Any) -> None:
    """Fine-tune what `model` is, or go on with a run of fine-tuning a Hugging Face model."""
    given = {name: value for name, value in given.items() if value is not None}
    if resume is None and (model is None or data is None):
        raise InputError("slimgrad finetune: expected MODEL and DATA, or --resume RUN")
    if resume is None and model is not None and data is not None and not is_hugging_face(model):
        _refuse(given, {*OF_RUNS, *NUMBERS}, f"{model} is a run of slimgrad: expected no", "")
        numbers = {name: given[name] for name in NUMBERS if name in given}
        options = Options(
            corpus=data,
            out=out,
            numbers=numbers,
            settings=tuple(given.get("settings", ())),
            data_dir=given.get("data_dir"),
        )
        run_finetuning(options, Path(model))
        return
    _refuse(given, set(given) - set(OF_RUNS), "a Hugging Face model: expected no", ", which is of runs of slimgrad")
    from slimgrad.cli.tuning import run_tuning

    run_tuning(model, data, resume=resume, out=out, given=given)


def _refuse(given: dict[str, Any], known: set[str], what: str, why: str) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"{what} {'--set' if name == 'settings' else '--' + name.replace('_', '-')}{why}")


def is_hugging_face(name: str) -> bool:
    """Whether that is a Hugging Face model, by its folder or a name to fetch; a run of slimgrad otherwise.

    Raises:
        InputError: it is neither.
    """
    path = Path(name)
    if not path.exists():
        is_name = bool(_NAME.fullmatch(name)) and (path.parent == Path() or not path.parent.exists())
        if is_name or split_snapshot_path(path)[1]:
            return is_name
        raise InputError(f"{name}: expected the folder of a run, or of a Hugging Face model, found no such folder")
    if path.is_file() or split_snapshot_path(path)[1]:
        return False
    if not (path / CONFIG).is_file():
        found = "an adapter: name the model it belongs to" if (path / "adapter_config.json").exists() else ""
        raise InputError(
            f"{name}: expected the folder of a run, or of a Hugging Face model (config.json with model_type), found "
            f"{found or 'a folder without config.json'}"
        )
    try:
        record = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path / CONFIG}: expected the record of a run of slimgrad, or the configuration of a Hugging Face model, "
            f"in JSON; it cannot be read: {error}"
        ) from error
    if isinstance(record, dict) and record.keys() & {"model_type", "config"}:
        return "model_type" in record
    raise InputError(
        f"{path / CONFIG}: expected the record of a run of slimgrad, or the configuration of a Hugging Face model with "
        "its model_type; found neither"
    )
