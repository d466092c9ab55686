"""The folder of a training run of a Performer on bytes.

```
RUN/
  config.json      the configuration, the corpus with its checksum, and every session that worked on the run
  metrics.jsonl    a `Row` per step
  snapshots/       with the model's shape in each
  gradient/, traces/   of gradients that take long: see `journalled`
  curve.png, sample.txt, memory.json   made when the run ends
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimgrad.bytelm.config import TrainConfig
from slimgrad.bytelm.model_file import describe_shape, read_model, read_shape, require_shape
from slimgrad.bytelm.optimizer import make_optimizer
from slimgrad.bytelm.row import Row
from slimgrad.errors import InputError
from slimgrad.models.performer import Performer
from slimgrad.runs import folder as runs
from slimgrad.runs.folder import CONFIG, METRICS, SNAPSHOTS, latest_snapshot, split_snapshot_path
from slimgrad.runs.journal import Journal
from slimgrad.runs.snapshot import DIVERGED, MODEL, list_snapshots, read_snapshot, restore, step_of


class RunFolder(runs.RunFolder[Row]):
    """A run that this process works on: see `runs.folder`."""

    row = Row

    @classmethod
    def create(
        cls, path: Path | None, corpus: str, record: dict[str, Any], initial: Performer | None = None
    ) -> RunFolder:
        """A new run, as `create_in` has it.

        Args:
            path: a folder that does not exist or is empty; None: runs/CORPUS-DATE-TIME in the working directory.
            corpus: the corpus' name.
            record: for config.json.
            initial: the model to begin with, where the configuration does not tell. It is saved before config.json, so
                a run can always go on without the place that it came from.
        """

        def save_initial(run: RunFolder) -> None:
            if initial is not None:
                run.save(step=0, bytes_seen=0, model=initial, optimizer=make_optimizer(run.config, initial))

        return cls.create_in(path, corpus, record, save_initial)

    @staticmethod
    def check(record: dict[str, Any]) -> TrainConfig:
        """The configuration in a record."""
        return TrainConfig.from_dict(record["config"])

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self.check(self.record)

    def save(self, *, step: int, bytes_seen: int, model: Performer, optimizer: torch.optim.Optimizer) -> None:
        """A snapshot, after the metrics up to it are on the disk."""
        noted = {"bytes_seen": bytes_seen, "config": self.record["config"]}
        self.save_snapshot(step=step, model=model, optimizer=optimizer, noted=noted, metadata=describe_shape(model))

    def load(self, model: Performer, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Put the snapshot to go on from into a model and its optimiser; its step and bytes seen, 0 without one."""
        if self.snapshot is None:
            return 0, 0
        path = self.snapshot.path
        require_shape(model.config, read_shape(path / MODEL), path)
        restore(self.snapshot, model, optimizer)
        return self.snapshot.step, self.snapshot.noted["bytes_seen"]


def read_record(folder: Path) -> dict[str, Any]:
    """What config.json of a run holds.

    Raises:
        InputError: there is no run, or its record cannot be read.
    """
    return runs.read_record(folder, RunFolder.check)


def read_rows(folder: Path) -> list[Row]:
    """The metrics of a run; a last line that a kill left unfinished does not count."""
    return Journal(folder / METRICS, Row).rows()


def open_model(path: Path) -> tuple[Performer, TrainConfig | None]:
    """A trained model, and the configuration of the run that it belongs to.

    Args:
        path: the folder of a run (its latest snapshot), a snapshot's folder, or a model.safetensors that slimgrad
            wrote, for which there may be no configuration.

    Raises:
        InputError: nothing of the kind, or damaged.
    """
    if path.is_file():
        return read_model(path), None
    config = None
    folder, named = split_snapshot_path(path)
    if named is None or (folder / CONFIG).exists():
        config = RunFolder.check(read_record(folder))
    snapshot = read_snapshot(named) if named else latest_snapshot(folder)
    if snapshot is None:
        raise InputError(f"{path}: expected a trained model, the run has no snapshot yet. Let it go on first")
    return read_model(snapshot.path / MODEL), config


def describe_step(path: Path, config: TrainConfig | None) -> str:
    """In words, of which step the model is that `open_model` finds there; "" for a file, which does not tell."""
    if path.is_file():
        return ""
    folder, named = split_snapshot_path(path)
    snapshot = named or list_snapshots(folder / SNAPSHOTS)[0]
    step = step_of(snapshot)
    of_all = "" if config is None else f" of {config.steps:,}"
    ended = ", after which the run diverged" if any(snapshot.parent.glob(f"{DIVERGED}*")) else ""
    return f"{named or folder}: step {step:,}{of_all}{ended}"


def seconds_so_far(folder: Path) -> float:
    """Seconds that the steps in the metrics took; 0 where there are none."""
    rows = read_rows(folder)
    return rows[-1].seconds if rows else 0.0
