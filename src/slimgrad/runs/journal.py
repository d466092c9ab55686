"""A line of JSON per step, as it happens; what a kill left unfinished is dropped, what is spoilt before it is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, Protocol, TypeVar

from slimgrad.errors import InputError
from slimgrad.runs.files import push_to_disk, storage_errors


class StepRow(Protocol):
    """What one step measured: a dataclass whose fields JSON can hold, one of which is the number of the step."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def step(self) -> int:
        """From 1."""
        ...


R = TypeVar("R", bound=StepRow)


class Journal(Generic[R]):
    """The rows of a run in a file."""

    def __init__(self, path: Path, row: Callable[..., R]) -> None:
        self.path = path
        self._row = row
        self._file: IO[str] | None = None

    def add(self, row: R) -> None:
        """One step's line."""
        with storage_errors(self.path):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(dataclasses.asdict(row)) + "\n")
            self._file.flush()

    def rows(self) -> list[R]:
        """Every row so far; a last line that a kill left unfinished does not count."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        return [self._row(**json.loads(line)) for line in lines if line.endswith("\n")]

    def push_to_disk(self) -> None:
        """Wait until what was added is on the disk."""
        if self._file is not None:
            with storage_errors(self.path):
                push_to_disk(self.path)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def cut_after(self, step: int) -> None:
        """Cut off the rows after a step, and what a kill or a power cut left there in their place.

        Raises:
            InputError: a row up to that step cannot be read.
        """
        if not self.path.exists():
            return
        end = last = 0
        with storage_errors(self.path), self.path.open("rb+") as file:
            for number, line in enumerate(file, start=1):
                row = self._parse(line)
                if row is None and last < step:
                    raise InputError(
                        f"{self.path}, line {number}: expected the row of a step, it cannot be read. Mend it, or "
                        f"remove the file to go on without the rows up to step {step:,}"
                    )
                if row is None or row.step > step:
                    break
                end, last = end + len(line), row.step
            file.truncate(end)

    def _parse(self, line: bytes) -> R | None:
        try:
            return self._row(**json.loads(line)) if line.endswith(b"\n") else None
        except (ValueError, TypeError):
            return None
