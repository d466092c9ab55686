"""The folder of a run: made new, never written over."""

from __future__ import annotations

import csv
import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from slimgrad.errors import InputError
from slimgrad.train import Row


class RunFolder:
    """Where a run's results go: config.json, metrics.csv (a line per step, as it happens), curve.png, sample.txt.

    Args:
        path: a folder that does not exist or is empty; None: runs/CORPUS-DATE-TIME in the working directory.
        corpus: the corpus' name.

    Raises:
        InputError: the path is a file, a folder that holds something, or cannot be made.
    """

    def __init__(self, path: Path | None, corpus: str) -> None:
        self.path = path or _fresh(Path("runs"), f"{corpus}-{datetime.now():%Y%m%d-%H%M%S}")
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                kind = "a folder that holds something" if self.path.is_dir() else "a file"
                raise InputError(f"--out {self.path}: expected a new or empty folder, found {kind}. Name another one")
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.path}: the folder cannot be made: {error.strerror}. Name another") from error
        self._metrics: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        self._metrics = (self.path / "metrics.csv").open("x", newline="", encoding="utf-8")
        csv.writer(self._metrics).writerow(field.name for field in dataclasses.fields(Row))
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def add(self, row: Row) -> None:
        """One step's line; what was not measured stays empty."""
        assert self._metrics is not None
        csv.writer(self._metrics).writerow(dataclasses.astuple(row))
        self._metrics.flush()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A new file of JSON."""
        with (self.path / name).open("x", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")

    def write_bytes(self, name: str, content: bytes) -> None:
        """A new file of bytes."""
        with (self.path / name).open("xb") as file:
            file.write(content)


def _fresh(parent: Path, name: str) -> Path:
    """A name in `parent` that is still free: two runs may begin in one second."""
    candidate, number = parent / name, 2
    while candidate.exists():
        candidate, number = parent / f"{name}-{number}", number + 1
    return candidate
