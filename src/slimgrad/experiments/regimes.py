"""Training runs of the programme: plain, chunked, or one and from half-way on the other (paper, section 4.3)."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from slimgrad.data import Corpus, load_corpus
from slimgrad.errors import InputError
from slimgrad.train import Row, RunFolder, TrainConfig, train
from slimgrad.train.files import PARTIAL
from slimgrad.train.folder import CONFIG, read_record

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


def load_text(corpus: str | None, data_dir: str | None) -> Corpus:
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
        _copy(Path(f"{first_half}{HALF}"), path)
    if not (path / CONFIG).exists():
        return RunFolder.create(path, corpus.name if corpus else config.task, {"config": config.to_dict()})
    record = read_record(path)
    run = RunFolder.reopen(path)
    run.record = record | {"config": config.to_dict()}
    run.save_record()
    return run


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    partial = target.with_name(f"{PARTIAL}{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".lock"))
    os.replace(partial, target)
