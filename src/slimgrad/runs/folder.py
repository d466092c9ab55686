"""The folder of a run: made new, taken up again, read by other commands; never written over.

```
RUN/
  config.json      the run's record: what it is, and whatever else its kind writes down
  metrics.jsonl    a line per step, as it happens
  snapshots/       the latest ones (see `snapshot`)
```

One process at a time writes to it: a lock that the system takes back from a process that dies. A kind of run is a
subclass that says what its rows are and what its record must hold.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self

import torch
from torch import nn

from slimgrad.errors import InputError
from slimgrad.extras import require_extra
from slimgrad.runs.files import NO_LOCKS, PARTIAL, write_atomically
from slimgrad.runs.journal import Journal, R
from slimgrad.runs.snapshot import DIVERGED, RECORD, SUPERSEDED, Snapshot, list_snapshots, read_snapshot, save_snapshot

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger("slimgrad")
CONFIG, METRICS, SNAPSHOTS, _LOCK = "config.json", "metrics.jsonl", "snapshots", ".lock"


class RunFolder(Generic[R]):
    """A run that this process works on. A context manager: leaving it closes the metrics and unlocks the folder.

    Made by `create_in` and `reopen`.

    Attributes:
        path: the folder.
        record: what config.json holds.
        snapshot: from where the run goes on; None: from its first step.
    """

    row: Callable[..., R]  # makes a row of the fields that JSON holds; said by the subclass

    def __init__(self, path: Path, record: dict[str, Any], snapshot: Snapshot | None, lock: FileLock) -> None:
        self.path = path
        self.record = record
        self.snapshot = snapshot
        self._lock = lock
        self._journal: Journal[R] = Journal(path / METRICS, type(self).row)

    @classmethod
    def create_in(
        cls, path: Path | None, name: str, record: dict[str, Any], first: Callable[[Self], None] | None = None
    ) -> Self:
        """A new run.

        Args:
            path: a folder that does not exist or is empty; None: runs/NAME-DATE-TIME in the working directory.
            name: what the run is about.
            record: for config.json.
            first: what to write before config.json, without which nobody takes the folder for a run.

        Raises:
            InputError: the path is a file, a folder that holds something, or cannot be made.
        """
        path = path or fresh_name(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        require_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {path}: the folder cannot be made: {error.strerror}. Name another") from error
        run = cls(path, record, None, _locked(path))
        try:
            if first is not None:
                first(run)
            run.save_record()
        except BaseException:
            run.__exit__()
            raise
        return run

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """Take a run up again from its latest snapshot, or from the snapshot that `path` names.

        Raises:
            InputError: there is no run, another process works on it, or the snapshot is damaged.
        """
        folder, named = split_snapshot_path(path)
        record = read_record(folder, cls.check)
        lock = _locked(folder)
        try:
            snapshot = read_snapshot(named) if named else latest_snapshot(folder)
            run = cls(folder, record, snapshot, lock)
            run._forget_what_follows()
        except BaseException:
            lock.release()
            raise
        return run

    @staticmethod
    def check(record: dict[str, Any]) -> object:
        """Raise `ValueError` or `KeyError` where that is no record of this kind of run."""
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        self._lock.release()

    def save_record(self) -> None:
        """Write config.json anew."""
        self.write(CONFIG, (json.dumps(self.record, indent=2) + "\n").encode())

    def write(self, name: str, content: bytes) -> None:
        """A file of the run, whole or not at all; in the place of one of that name."""
        write_atomically(self.path / name, content)

    def add(self, row: R) -> None:
        """One step's line in the metrics."""
        self._journal.add(row)

    def rows(self) -> list[R]:
        """Every step's row so far."""
        return self._journal.rows()

    def save_snapshot(
        self,
        *,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        noted: Mapping[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """A snapshot, as `snapshot.save_snapshot` has it, after the metrics up to it are on the disk."""
        self._journal.push_to_disk()
        path = save_snapshot(
            self.path / SNAPSHOTS, step=step, model=model, optimizer=optimizer, noted=noted, metadata=metadata
        )
        self.snapshot = Snapshot(path=path, step=step, noted=dict(noted or {}), environment={})

    def distrust(self) -> None:
        """Put the latest snapshot aside: its parameters are finite numbers, but what they compute is not."""
        if self.snapshot is not None:
            self.snapshot.path.rename(fresh_name(self.snapshot.path.parent, f"{DIVERGED}{self.snapshot.path.name}"))
            self.snapshot = latest_snapshot(self.path)

    def _forget_what_follows(self) -> None:
        """What was done after the snapshot is done again: drop its metrics, and step aside with later snapshots."""
        self._journal.cut_after(self.snapshot.step if self.snapshot else 0)
        for unfinished in (self.path / SNAPSHOTS).glob(f"{PARTIAL}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for later in list_snapshots(self.path / SNAPSHOTS):
            if self.snapshot is None or later.name > self.snapshot.path.name:
                later.rename(fresh_name(later.parent, f"{SUPERSEDED}{later.name}"))


def read_record(folder: Path, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """What config.json of a run holds.

    Args:
        folder: of the run.
        check: raises `ValueError` or `KeyError` where the record is of no use.

    Raises:
        InputError: there is no run, or its record cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        found = "a folder without config.json" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: expected the folder of a run, found {found}. Check the path")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the record of a run, it cannot be read: {error}") from error
    return record


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


def split_snapshot_path(path: Path) -> tuple[Path, Path | None]:
    """The folder of the run, and the snapshot if that is what was named."""
    is_snapshot = path.name.startswith("step-") and (path.parent.name == SNAPSHOTS or (path / RECORD).exists())
    return (path.resolve().parent.parent, path) if is_snapshot else (path, None)


def require_new(path: Path) -> None:
    """Refuse a path where something is.

    Raises:
        InputError: it is a file, or a folder that holds something.
    """
    try:
        if not path.exists():
            return
    except OSError as error:
        raise InputError(f"--out {path}: the folder cannot be made: {error.strerror}. Name another") from error
    if (path / CONFIG).exists():
        raise InputError(
            f"--out {path}: expected a new or empty folder, found a run. Go on with it: slimgrad train --resume "
            f"{path}, or name another folder"
        )
    if not path.is_dir() or any(entry.name != _LOCK for entry in path.iterdir()):
        kind = "a folder that holds something" if path.is_dir() else "a file"
        raise InputError(f"--out {path}: expected a new or empty folder, found {kind}. Name another one")


def fresh_name(parent: Path, name: str) -> Path:
    """A name in `parent` that is still free: two runs may begin in one second."""
    candidate, number = parent / name, 2
    while candidate.exists():
        candidate, number = parent / f"{name}-{number}", number + 1
    return candidate


def _intact(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            yield read_snapshot(path).path
        except InputError:
            continue


def _locked(path: Path) -> FileLock:
    require_extra("train", "the folder of a run", "filelock")
    from filelock import FileLock, Timeout

    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{path}: another process works on this run. Wait for it, or stop it first") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{path}: expected a folder to write to, got: {error.strerror or error}") from error
        logger.warning("%s: this file system has no locks. Let no other process work on the run meanwhile", path)
    return lock
