"""A document in a folder: whole or absent, with a checksum, and read without running code.

    folder/
      segment.json             which file it is, its bytes and checksum
      progress-3f0c....pt      the document: tensors, numbers and plain values (torch.save)
      rows-91be....bin         rows along time, which the document speaks of: see `saved_rows`

The others are written under names of their own before the first comes to speak of them, in one piece.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import safe_globals

from slimgrad.call.saved_rows import SavedRows, taken_out
from slimgrad.errors import InputError
from slimgrad.runs.files import PARTIAL, push_to_disk, sha256, storage_errors, write_atomically
from slimgrad.states.base import State
from slimgrad.sweep import tree
from slimgrad.sweep.kinds import subclasses
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.series import Rows

_RECORD, _FORMAT, _ROWS = "segment.json", 2, "files of rows"


class _Hashing:
    """A file that is hashed as it is written.

    An error is kept for the end: torch.save would put one of its own in its place.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.hash, self.num_bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.num_bytes += len(data)
        try:
            return len(data) if self.error is not None else self._file.write(data)
        except OSError as error:
            self.error = error
            return len(data)

    def flush(self) -> None:
        self._file.flush()


def write_document(folder: Path, document: dict[str, Any], before: SavedRows | None = None) -> SavedRows:
    """Put `document` in place of what the folder holds. Its "device", if it has one, is that of the model.

    Args:
        folder: is made, if it is not there.
        document: dicts, lists and tuples of tensors, plain values and `Rows`.
        before: of these, what stands in the folder already.

    Returns:
        What stands there now.

    Raises:
        StorageError: it could not be written. What was there is as it was.
    """
    partial, series = folder / f"{PARTIAL}progress", dict[str, Rows]()
    document = taken_out(document, series)
    before = SavedRows(folder) if before is None or before.folder != folder else before
    with storage_errors(folder):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        rows = before.with_new(series)
        document |= {_ROWS: rows.as_dict()}
        try:
            with partial.open("wb") as file:
                hashing = _Hashing(file)
                torch.save(document, hashing)  # pyright: ignore[reportArgumentType]
                if hashing.error is not None:
                    raise hashing.error
            push_to_disk(partial)
            name = f"progress-{hashing.hash.hexdigest()[:16]}.pt"
            partial.replace(folder / name)
            for path in (folder, *(path.parent for path in new)):
                push_to_disk(path)
        finally:
            partial.unlink(missing_ok=True)
    record = {"format": _FORMAT, "file": name, "bytes": hashing.num_bytes, "sha256": hashing.hash.hexdigest()}
    record |= {"device": str(document["device"])} if "device" in document else {}
    write_atomically(folder / _RECORD, (json.dumps(record, indent=1) + "\n").encode())
    for old in (*folder.glob("progress-*.pt"), *folder.glob("rows-*.bin")):
        if old.name not in (name, *rows.checksums):
            with suppress(OSError):  # mapped by a load, which Windows does not let go
                old.unlink()
    return rows


def read_document(folder: Path, device: torch.device | None = None) -> tuple[dict[str, Any], SavedRows]:
    """What `write_document` wrote last, and returned. Its tensors are mapped from the files, which may go meanwhile.

    What was on the device of its model is put on this one, if it is another (a GPU of another number).

    Raises:
        InputError: nothing is there, or it is damaged.
    """
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        file = folder / record["file"]
        if record["format"] != _FORMAT:
            raise InputError(f"{path}: expected format {_FORMAT}, found {record['format']}: another slimgrad wrote it")
        if sha256(file) != record["sha256"]:
            raise InputError(f"{file} is damaged: expected sha256 {record['sha256'][:12]}..., found another")
        with safe_globals(list(subclasses(State))):  # pyright: ignore[reportArgumentType]
            moves = _from_one_to_the_other(record.get("device"), device)
            document = torch.load(file, weights_only=True, mmap=True, map_location=moves)
        if str(document.get("device")) != str(record.get("device")):
            raise InputError(f"{path} is damaged: expected the device {document.get('device')}, found another")
        rows = SavedRows(folder, document.pop(_ROWS))
        rows.check()
        return rows.put_back(document), rows
    except FileNotFoundError as error:
        raise InputError(f"{folder}: expected a saved segment, found no {Path(str(error.filename)).name}") from error
    except RuntimeError as error:
        if "deserialize object" not in str(error):
            raise
        raise InputError(f"{folder}: expected the devices that the segment was saved on ({error})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{folder}: expected a saved segment, found one that cannot be read ({error})") from error


def _from_one_to_the_other(before: str | None, now: torch.device | None) -> Callable[[Any, str], Any] | None:
    """For torch.load; None where the model's device is the same."""
    if before is None or now is None or before == str(now):
        return None
    return lambda storage, place: storage.to(device=now) if place == before else None


def schedule_as_dict(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain values."""
    values = {f.name: getattr(schedule, f.name) for f in fields(schedule)}
    plain = {name: {"path": str(value)} if isinstance(value, Path) else value for name, value in values.items()}
    return {"schedule": _name(type(schedule)), "values": plain}


def schedule_from_dict(saved: dict[str, Any]) -> Schedule:
    """The schedule again."""
    kinds: dict[str, Callable[..., Schedule]] = {_name(kind): kind for kind in subclasses(Schedule)}
    if saved["schedule"] not in kinds:
        raise InputError(
            f"saved with the schedule {saved['schedule']}, which is not known here; import its module first"
        )
    values = {n: Path(v["path"]) if isinstance(v, dict) else v for n, v in saved["values"].items()}
    return kinds[saved["schedule"]](**values)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def structure_as_text(spec: tree.TreeSpec) -> str:
    """A tree's structure, for a file that is read without running code.

    Raises:
        InputError: it has containers that cannot be written.
    """
    with suppress(NotImplementedError, TypeError):  # no text; or one that gives other keys back
        if tree.loads(tree.dumps(spec)) == spec:
            return tree.dumps(spec)
    raise InputError(
        "the state that was passed as state= cannot be saved: expected dicts (with keys of text or numbers), lists and "
        f"tuples, got {spec}. A named tuple needs a name: torch.utils._pytree._register_namedtuple"
    )
