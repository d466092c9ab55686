"""A line of JSON per step, as it happens; what a kill left unfinished is dropped, what is spoilt before it is named."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_type_hints

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

        Rows may begin with any step, since those before may have been removed; from there on each follows the last.

        Raises:
            InputError: a row up to that step cannot be read, or is not there.
        """
        if not self.path.exists():
            return
        end = last = number = 0
        with storage_errors(self.path), self.path.open("rb+") as file:
            for number, line in enumerate(file, start=1):
                row = self._parse(line)
                follows = row is not None and row.step > 0 and last in (0, row.step - 1)
                if row is None or not follows:
                    if last < step or (row is not None and row.step <= step):
                        raise self._spoilt(number, step, "what cannot be read" if row is None else f"step {row.step:,}")
                    break
                last = row.step
                end += len(line) if last <= step else 0
            if 0 < last < step:
                raise self._spoilt(number + 1, step, "the end of the file")
            file.truncate(end)

    def _spoilt(self, number: int, step: int, found: str) -> InputError:
        return InputError(
            f"{self.path}, line {number}: expected the row of a step, in order, found {found}. Mend it, or remove the "
            f"file to go on without the rows up to step {step:,}"
        )

    def _parse(self, line: bytes) -> R | None:
        """The row in a line; None where it is none, or holds what its fields cannot."""
        try:
            row = self._row(**json.loads(line)) if line.endswith(b"\n") else None
        except (ValueError, TypeError):
            return None
        return row if row is None or _fits(row) else None


def _fits(row: StepRow) -> bool:
    """Whether numbers are numbers; a whole one will do for any."""
    for name, kinds in _kinds(type(row)).items():
        kind = type(getattr(row, name))
        if not kinds.isdisjoint((int, float)) and kind not in kinds and not (kind is int and float in kinds):
            return False
    return True


@functools.cache
def _kinds(row: type[StepRow]) -> dict[str, set[Any]]:
    """What each field may hold; nothing where the types cannot be resolved, as those of a class in a function."""
    try:
        return {name: set(get_args(hint)) or {hint} for name, hint in get_type_hints(row).items()}
    except NameError:
        return {}
