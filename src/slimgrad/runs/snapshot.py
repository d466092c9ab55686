"""Snapshots of any model and optimiser, from which a run goes on bit for bit: whole, checksummed, and only a few.

```
snapshots/step-00000400/
  model.safetensors       the parameters; what the caller says of the model is in the file's metadata, so it can travel
                          alone
  optimizer.safetensors   the optimiser's state, by parameter
  snapshot.json           step, what the caller notes, checksums of both files and of itself, what it was computed on
```

A snapshot is written into a folder of another name, pushed to the disk and renamed: a kill leaves it whole or absent.
No clock and no generator's state is here: draws should follow from a seed and the step. So two runs that agree in bits
leave snapshots that agree in bits.
Cost: the parameters' bytes three times over for AdamW, on disk; nothing in memory. Reading checks every byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimgrad.errors import InputError
from slimgrad.runs.environment import describe_environment
from slimgrad.runs.files import PARTIAL, push_to_disk, sha256, storage_errors
from slimgrad.runs.optimizer_state import pack, unpack
from slimgrad.runs.tensors import fill, model_tensors, read_metadata, read_tensors, save_tensors

MODEL, OPTIMIZER, RECORD = "model.safetensors", "optimizer.safetensors", "snapshot.json"
KEPT = 2
SUPERSEDED, DIVERGED = "superseded-", "diverged-"  # put aside: no longer, or never, of use
_REST = "slimgrad_optimizer"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot whose every byte was checked.

    Attributes:
        path: its folder.
        step: optimiser steps done.
        noted: what else the run noted, as numbers and words.
        environment: what it was computed on (see `describe_environment`).
    """

    path: Path
    step: int
    noted: dict[str, Any]
    environment: dict[str, Any]


def save_snapshot(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    noted: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a snapshot of this step into `folder`, then remove all but the latest few.

    Args:
        folder: of the run's snapshots.
        step: optimiser steps done.
        model, optimizer: any; tied weights are stored once.
        noted: what else to go on from, plain enough for JSON.
        metadata: what the model's file says of itself.

    Raises:
        StorageError: it could not be written. Those before it are untouched.
        InputError: the optimiser or the model holds what cannot be stored.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL}{target.name}"
    moments, rest = pack(model, optimizer)
    with storage_errors(target):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_tensors(partial / MODEL, model_tensors(model), metadata)
            save_tensors(partial / OPTIMIZER, moments, {_REST: rest})
            record = {
                "step": step,
                **(noted or {}),
                "environment": describe_environment(),
                "files": {name: sha256(partial / name) for name in (MODEL, OPTIMIZER)},
            }
            sealed = record | {"checksum": _checksum(record)}
            (partial / RECORD).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                push_to_disk(path)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        push_to_disk(folder)
        _remove(list_snapshots(folder)[KEPT:])
    return target


def list_snapshots(folder: Path) -> list[Path]:
    """The snapshots in a folder, the latest first; whether they are intact is for `read_snapshot` to say."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step after which a snapshot was taken."""
    return int(path.name.removeprefix("step-"))


def read_snapshot(path: Path) -> Snapshot:
    """Check every byte of a snapshot.

    Raises:
        InputError: no snapshot, or a damaged one, with the file that is damaged.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        claimed = record.pop("checksum")
        if claimed != _checksum(record):
            raise InputError(f"snapshot {path} is damaged: {RECORD} does not match its own checksum")
        for name, expected in record.pop("files").items():
            found = sha256(path / name)
            if found != expected:
                raise InputError(
                    f"snapshot {path} is damaged: {name}: expected sha256 {expected[:12]}..., found {found[:12]}..."
                )
        step, environment = record.pop("step"), record.pop("environment")
        return Snapshot(path=path, step=step, noted=record, environment=environment)
    except OSError as error:
        raise InputError(f"snapshot {path} is damaged: {error.filename}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"snapshot {path} is damaged: {RECORD} cannot be read ({error})") from error


def restore(snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a snapshot's parameters and optimiser state into a model and its optimiser.

    Values are copied into tensors that torch allocated, so that they lie where they would in an undisturbed run: some
    kernels choose their path by a tensor's alignment.

    Raises:
        InputError: the model has other parameters.
    """
    fill(model, read_tensors(snapshot.path / MODEL), snapshot.path)
    file = snapshot.path / OPTIMIZER
    unpack(model, optimizer, read_tensors(file), read_metadata(file).get(_REST))


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _remove(paths: Iterable[Path]) -> None:
    """Remove snapshots; one that is half removed no longer bears a snapshot's name."""
    for path in paths:
        doomed = path.with_name(f"{PARTIAL}{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
