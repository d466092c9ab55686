"""The folder of a run: made new, taken up again, read by other commands; never written over.

```
RUN/
  config.json      the configuration, the corpus with its checksum, and every session that worked on the run
  metrics.jsonl    a line per step, as it happens
  snapshots/       the latest ones (see `snapshot`)
  curve.png, sample.txt, memory.json   made when the run ends
```

One process at a time writes to it: a lock that the system takes back from a process that dies.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout

from slimgrad.errors import InputError
from slimgrad.models.performer import Performer
from slimgrad.runs.files import PARTIAL, push_to_disk, storage_errors, write_atomically
from slimgrad.train.config import TrainConfig
from slimgrad.train.optimizer import make_optimizer
from slimgrad.train.row import Row
from slimgrad.train.snapshot import (
    DIVERGED,
    MODEL,
    RECORD,
    SUPERSEDED,
    Snapshot,
    fill,
    list_snapshots,
    read_model_file,
    read_snapshot,
    save_snapshot,
)

CONFIG, METRICS, SNAPSHOTS, _LOCK = "config.json", "metrics.jsonl", "snapshots", ".lock"


class RunFolder:
    """A run that this process works on. A context manager: leaving it closes the metrics and unlocks the folder.

    Made by `RunFolder.create` and `RunFolder.reopen`.

    Attributes:
        path: the folder.
        record: what config.json holds.
        snapshot: from where the run goes on; None: from its first step.
    """

    def __init__(self, path: Path, record: dict[str, Any], snapshot: Snapshot | None, lock: FileLock) -> None:
        self.path = path
        self.record = record
        self.snapshot = snapshot
        self._lock = lock
        self._metrics: IO[str] | None = None

    @classmethod
    def create(
        cls, path: Path | None, corpus: str, record: dict[str, Any], initial: Performer | None = None
    ) -> RunFolder:
        """A new run.

        Args:
            path: a folder that does not exist or is empty; None: runs/CORPUS-DATE-TIME in the working directory.
            corpus: the corpus' name.
            record: for config.json.
            initial: the model to begin with, where the configuration does not tell. It is saved before config.json, so
                a run can always go on without the place that it came from.

        Raises:
            InputError: the path is a file, a folder that holds something, or cannot be made.
        """
        path = path or _fresh(Path("runs"), f"{corpus}-{datetime.now():%Y%m%d-%H%M%S}")
        require_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {path}: the folder cannot be made: {error.strerror}. Name another") from error
        run = cls(path, record, None, _locked(path))
        try:
            if initial is not None:
                run.save(step=0, bytes_seen=0, model=initial, optimizer=make_optimizer(run.config, initial))
            run.save_record()
        except BaseException:
            run.__exit__()
            raise
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Take a run up again from its latest snapshot, or from the snapshot that `path` names.

        Raises:
            InputError: there is no run, another process works on it, or the snapshot is damaged.
        """
        folder, named = split_snapshot_path(path)
        record = read_record(folder)
        lock = _locked(folder)
        try:
            snapshot = read_snapshot(named) if named else latest_snapshot(folder)
            run = cls(folder, record, snapshot, lock)
            run._forget_what_follows()
        except BaseException:
            lock.release()
            raise
        return run

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._lock.release()

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return TrainConfig.from_dict(self.record["config"])

    def save_record(self) -> None:
        """Write config.json anew."""
        self.write(CONFIG, (json.dumps(self.record, indent=2) + "\n").encode())

    def write(self, name: str, content: bytes) -> None:
        """A file of the run, whole or not at all; in the place of one of that name."""
        write_atomically(self.path / name, content)

    def add(self, row: Row) -> None:
        """One step's line in the metrics."""
        path = self.path / METRICS
        with storage_errors(path):
            if self._metrics is None:
                self._metrics = path.open("a", encoding="utf-8")
            self._metrics.write(json.dumps(dataclasses.asdict(row)) + "\n")
            self._metrics.flush()

    def rows(self) -> list[Row]:
        """Every step's row so far."""
        return read_rows(self.path)

    def save(self, *, step: int, bytes_seen: int, model: Performer, optimizer: torch.optim.Optimizer) -> None:
        """A snapshot, after the metrics up to it are on the disk."""
        if self._metrics is not None:
            with storage_errors(self.path / METRICS):
                push_to_disk(self.path / METRICS)
        path = save_snapshot(
            self.path / SNAPSHOTS, step=step, bytes_seen=bytes_seen, model=model, optimizer=optimizer
        )  # fmt: skip
        self.snapshot = Snapshot(path=path, step=step, bytes_seen=bytes_seen, environment={})

    def distrust(self) -> None:
        """Put the latest snapshot aside: its parameters are finite numbers, but what they compute is not."""
        if self.snapshot is not None:
            self.snapshot.path.rename(_fresh(self.snapshot.path.parent, f"{DIVERGED}{self.snapshot.path.name}"))
            self.snapshot = latest_snapshot(self.path)

    def _forget_what_follows(self) -> None:
        """What was done after the snapshot is done again: drop its metrics, and step aside with later snapshots."""
        step = self.snapshot.step if self.snapshot else 0
        if (self.path / METRICS).exists():
            _keep_rows(self.path / METRICS, step)
        for unfinished in (self.path / SNAPSHOTS).glob(f"{PARTIAL}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for later in list_snapshots(self.path / SNAPSHOTS):
            if self.snapshot is None or later.name > self.snapshot.path.name:
                aside = _fresh(later.parent, f"{SUPERSEDED}{later.name}")
                later.rename(aside)


def read_record(folder: Path) -> dict[str, Any]:
    """What config.json of a run holds.

    Raises:
        InputError: there is no run, or its record cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: expected the folder of a run, found {found}. Check the path")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        TrainConfig.from_dict(record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the record of a run, it cannot be read: {error}") from error
    return record


def read_rows(folder: Path) -> list[Row]:
    """The metrics of a run; a last line that a kill left unfinished does not count."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def latest_snapshot(folder: Path) -> Snapshot | None:
    """The latest snapshot of a run; None where there is none yet.

    Raises:
        InputError: it is damaged. The message names an earlier one that is intact.
    """
    snapshots = list_snapshots(folder / SNAPSHOTS)
    if not snapshots:
        return None
    try:
        return read_snapshot(snapshots[0])
    except InputError as error:
        intact = next(_intact(snapshots[1:]), None)
        offer = f"The one before it is intact, and can be named instead of the run: {intact}"
        raise InputError(f"{error}. {offer if intact else 'No other one is intact'}") from error


def open_model(path: Path) -> tuple[Performer, TrainConfig | None]:
    """A trained model, and the configuration of the run that it belongs to.

    Args:
        path: the folder of a run (its latest snapshot), a snapshot's folder, or a model.safetensors that slimgrad
            wrote, for which there may be no configuration.

    Raises:
        InputError: nothing of the kind, or damaged.
    """
    config = None
    if path.is_file():
        file = path
    else:
        folder, named = split_snapshot_path(path)
        if named is None or (folder / CONFIG).exists():
            config = TrainConfig.from_dict(read_record(folder)["config"])
        snapshot = read_snapshot(named) if named else latest_snapshot(folder)
        if snapshot is None:
            raise InputError(f"{path}: expected a trained model, the run has no snapshot yet. Let it go on first")
        file = snapshot.path / MODEL
    shape, tensors = read_model_file(file)
    with torch.random.fork_rng(devices=[]):
        model = Performer(shape)
    fill(model, tensors, file)
    return model, config


def split_snapshot_path(path: Path) -> tuple[Path, Path | None]:
    """The folder of the run, and the snapshot if that is what was named."""
    is_snapshot = path.name.startswith("step-") and (path.parent.name == SNAPSHOTS or (path / RECORD).exists())
    return (path.resolve().parent.parent, path) if is_snapshot else (path, None)


def require_new(path: Path) -> None:
    """Refuse a path where something is.

    Raises:
        InputError: it is a file, or a folder that holds something.
    """
    if not path.exists():
        return
    if (path / CONFIG).exists():
        raise InputError(
            f"--out {path}: expected a new or empty folder, found a run. Go on with it: slimgrad train --resume "
            f"{path}, or name another folder"
        )
    if not path.is_dir() or any(entry.name != _LOCK for entry in path.iterdir()):
        kind = "a folder that holds something" if path.is_dir() else "a file"
        raise InputError(f"--out {path}: expected a new or empty folder, found {kind}. Name another one")


def seconds_so_far(folder: Path) -> float:
    """Seconds that the steps in the metrics took; 0 where there are none."""
    rows = read_rows(folder)
    return rows[-1].seconds if rows else 0.0


def _keep_rows(metrics: Path, step: int) -> None:
    """Cut off the rows after a step, and what a kill or a power cut left there in their place."""
    end = last = 0
    with storage_errors(metrics), metrics.open("rb+") as file:
        for number, line in enumerate(file, start=1):
            row = _parse_row(line)
            if row is None and last < step:
                raise InputError(
                    f"{metrics}, line {number}: expected the row of a step, it cannot be read. Mend it, or remove the "
                    f"file to go on without the rows up to step {step:,}"
                )
            if row is None or row.step > step:
                break
            end, last = end + len(line), row.step
        file.truncate(end)


def _parse_row(line: bytes) -> Row | None:
    try:
        return Row(**json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError):
        return None


def _intact(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            yield read_snapshot(path).path
        except InputError:
            continue


def _locked(path: Path) -> FileLock:
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{path}: another process works on this run. Wait for it, or stop it first") from error
    except OSError as error:
        raise InputError(f"{path}: expected a folder to write to, got: {error.strerror or error}") from error
    return lock


def _fresh(parent: Path, name: str) -> Path:
    """A name in `parent` that is still free: two runs may begin in one second."""
    candidate, number = parent / name, 2
    while candidate.exists():
        candidate, number = parent / f"{name}-{number}", number + 1
    return candidate
