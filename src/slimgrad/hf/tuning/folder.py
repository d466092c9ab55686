"""What a run leaves on disk, and how it is taken up again.

```
RUN/
  finetune.json     what was asked for, of which model and documents, and what came of it
  tokens/           the documents
  checkpoint-N/     the Trainer's own, the last two
  ...               at the end: the adapter, or the model, and its tokenizer
```
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from slimgrad.errors import InputError, StorageError
from slimgrad.runs.files import write_atomically

RECORD, TOKENS, TRAIN, EVAL, _LOCK = "finetune.json", "tokens", "train.arrow", "eval.arrow", ".lock"
_STATE = "trainer_state.json"  # what the Trainer writes last
_ELSEWHERE = "or name a folder on another disk with --out"
# as safetensors and torch.save say it
_FULL = (os.strerror(errno.ENOSPC), "PytorchStreamWriter failed writing", "unexpected pos")


class Folder:
    """A run that this process works on; a context manager that lets go of it.

    Attributes:
        path: the folder.
        record: what finetune.json holds.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: FileLock) -> None:
        self.path, self.record, self._lock = path, record, lock

    @classmethod
    def create(cls, path: Path | None, name: str) -> Self:
        """A new run; it has no record before `save_record`.

        Args:
            path: a folder that does not exist or is empty; None: runs/NAME-DATE-TIME.
            name: of the model.

        Raises:
            InputError: something is there.
        """
        path = path or _fresh(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        if (path / RECORD).exists() or any(path.glob("checkpoint-*")):
            raise InputError(
                f"--out {path}: expected a new or empty folder, found a run. If it is not finished, go on with it: "
                f"slimgrad finetune --resume {path}; or name another folder"
            )
        if path.exists() and (not path.is_dir() or any(entry.name != _LOCK for entry in path.iterdir())):
            kind = "a folder that holds something" if path.is_dir() else "a file"
            raise InputError(f"--out {path}: expected a new or empty folder, found {kind}. Name another one")
        try:
            (path / TOKENS).mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--out {path}: the folder cannot be made: {error.strerror}. Name another") from error
        return cls(path, {}, _locked(path))

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """A run that was begun.

        Raises:
            InputError: there is none, it is finished, or another process works on it.
        """
        file = path / RECORD
        if not file.is_file():
            found = "a folder without finetune.json" if path.is_dir() else "no such folder"
            raise InputError(f"--resume {path}: expected the folder of a run of slimgrad finetune, found {found}")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            settings = record["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: expected the record of a run, it cannot be read: {error}") from error
        if not isinstance(settings, dict) or "after" in record:
            raise InputError(f"--resume {path}: the run is finished; its result is there. Begin a new one")
        return cls(path, record, _locked(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._lock.release()
        begun = (self.path / RECORD).exists()
        if kind is not None and not begun:  # refused before it had begun
            shutil.rmtree(self.path, ignore_errors=True)
        if error is not None and _is_full(error):
            then = f"free some space, then slimgrad finetune --resume {self.path}"
            raise StorageError(
                f"{self.path}: the disk is full. "
                + (f"What was saved before is whole: {then}" if begun else f"Free some space, {_ELSEWHERE}")
            ) from error

    def save_record(self) -> None:
        """Write finetune.json anew."""
        write_atomically(self.path / RECORD, (json.dumps(self.record, indent=2) + "\n").encode())

    @property
    def train_file(self) -> Path:
        """The documents to train on."""
        return self.path / TOKENS / TRAIN

    @property
    def eval_file(self) -> Path:
        """Those to evaluate on, if they came from a file of their own."""
        return self.path / TOKENS / EVAL

    def last_checkpoint(self) -> Path | None:
        """The latest one that was written to its end; None where there is none."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
        for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
            try:
                json.loads((path / _STATE).read_text())
            except (OSError, ValueError):
                continue  # killed while it was written
            return path
        return None

    def require_space(self, num_bytes: int, what: str) -> None:
        """Refuse a disk that is too small.

        Raises:
            StorageError: with both figures.
        """
        free = shutil.disk_usage(self.path).free
        if num_bytes > free:
            raise StorageError(
                f"{self.path}: {what} need about {num_bytes / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB left. "
                f"Free some space, {_ELSEWHERE}"
            )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, Exception) and any(words in str(error) for words in _FULL)


def _fresh(parent: Path, name: str) -> Path:
    candidate, number = parent / name, 2
    while candidate.exists():
        candidate, number = parent / f"{name}-{number}", number + 1
    return candidate


def _locked(path: Path) -> FileLock:
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{path}: another process works on this run. Wait for it, or stop it first") from error
    return lock
