"""Training runs of the programme: plain, chunked, or one and from half-way on the other (paper, section 4.3)."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from slimgrad.bytelm import Row, RunFolder, TrainConfig, open_model, train
from slimgrad.bytelm.folder import read_record
from slimgrad.data import Corpus, load_corpus
from slimgrad.errors import InputError
from slimgrad.models import Performer
from slimgrad.runs.files import PARTIAL
from slimgrad.runs.folder import CONFIG, latest_snapshot

_CURVE_POINTS = 300
HALF = "-half"
BOOKS = "books"


def train_regime(
    *,
    folder: str,
    config: dict[str, Any],
    corpus: str | None = None,
    data_dir: str | None = None,
    first_half: str | None = None,
    keep_half: bool = False,
) -> dict[str, Any]:
    """Do a run, or what is left of it.

    Args:
        folder: the run's folder; where it exists, the run goes on from its latest snapshot.
        config: what `TrainConfig.to_dict` gave.
        corpus, data_dir: as `load_text` takes them; None: the configuration's task needs none.
        first_half: the folder of a run whose first half is this one's too: it is taken over, not done again.
        keep_half: leave the state after half of the steps beside the folder, for other runs' `first_half`.

    Returns:
        The loss of every step's group, every validation, and the last one's bits per byte and accuracy.
    """
    wanted = TrainConfig.from_dict(config)
    path = Path(folder)
    text = None if wanted.task == "copying" else load_text(corpus, data_dir)
    half = Path(f"{path}{HALF}")
    with _open(path, wanted, text, first_half) as run:

        def keep(step: int) -> None:
            if keep_half and 2 * step == wanted.steps and not half.exists():
                _copy(path, half)

        if run.snapshot is not None:
            keep(run.snapshot.step)  # a kill may have come between the snapshot and its copy
        rows = train(wanted, text, lambda row: keep(row.step), run=run).rows
    return summarize(rows)


def open_finished(run: str) -> tuple[Performer, TrainConfig]:
    """The model of a run that was trained to its end.

    Raises:
        InputError: it was not, or there is none.
    """
    model, config = open_model(Path(run))
    snapshot = latest_snapshot(Path(run))
    if config is None or snapshot is None or snapshot.step != config.steps:
        at = f"step {snapshot.step:,}" if snapshot else "nothing"
        raise InputError(f"{run}: expected a run that was trained to its end, found {at}. Let its own point finish")
    return model, config


def load_text(corpus: str | None, data_dir: str | Path | None) -> Corpus:
    """A corpus with a name, or "books": the folder of that name in `data_dir`."""
    folder = Path(data_dir) if data_dir else None
    if corpus != BOOKS:
        return load_corpus(corpus, data_dir=folder)
    if folder is None:
        raise InputError("books: expected --data-dir with a folder named books in it. Name it, or take enwik8")
    return load_corpus(folder / BOOKS)


def summarize(rows: list[Row]) -> dict[str, Any]:
    """A run in the numbers that a figure wants: the training loss in groups of steps, and every validation."""
    group = math.ceil(len(rows) / _CURVE_POINTS)
    groups = [rows[i : i + group] for i in range(0, len(rows), group)]
    validations = [row for row in rows if row.validation_bits is not None]
    last = validations[-1]
    return {
        "steps": [part[-1].step for part in groups],
        "bits": [sum(row.bits for row in part) / len(part) for part in groups],
        "validation_steps": [row.step for row in validations],
        "validation_bits": [row.validation_bits for row in validations],
        "validation_accuracy": [row.validation_accuracy for row in validations],
        "final_bits": last.validation_bits,
        "final_accuracy": last.validation_accuracy,
        "seconds": rows[-1].seconds,
        "resident_bytes": rows[-1].resident_bytes,
    }


def _open(path: Path, config: TrainConfig, corpus: Corpus | None, first_half: str | None) -> RunFolder:
    if first_half is not None and not (path / CONFIG).exists():
        _copy(Path(f"{first_half}{HALF}"), path, config)
    if not (path / CONFIG).exists():
        return RunFolder.create(path, corpus.name if corpus else config.task, {"config": config.to_dict()})
    if TrainConfig.from_dict(read_record(path)["config"]) != config:
        raise InputError(f"{path}: expected a run of this configuration, found one of another. Move it away")
    return RunFolder.reopen(path)


def _copy(source: Path, target: Path, config: TrainConfig | None = None) -> None:
    """Whole or not at all; from here on with `config`."""
    partial = target.with_name(f"{PARTIAL}{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".lock"))
    if config is not None:
        record = read_record(partial) | {"config": config.to_dict()}
        (partial / CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target)
