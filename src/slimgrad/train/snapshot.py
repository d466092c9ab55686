"""Snapshots: everything that a run needs to go on bit for bit, each whole, checksummed, and no more than a few of them.

```
snapshots/step-00000400/
  model.safetensors       the parameters; the model's shape is in the file's metadata, so it can travel alone
  optimizer.safetensors   the optimiser's moments, by parameter
  snapshot.json           step, bytes seen, checksums of both files and of itself, what it was computed on
```

A snapshot is written into a folder of another name, pushed to the disk and renamed: a kill leaves it whole or absent.
What is not here follows from the seed and the step (order of the data, random draws) or from the last row of the
metrics (seconds). So two runs that agree in bits leave snapshots that agree in bits.
Cost: the parameters' bytes three times over for AdamW, on disk; nothing in memory. Reading checks every byte.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import slimgrad
from slimgrad.errors import InputError
from slimgrad.models.performer import Performer, PerformerConfig
from slimgrad.runs.files import PARTIAL, push_to_disk, sha256, storage_errors

MODEL, OPTIMIZER, RECORD = "model.safetensors", "optimizer.safetensors", "snapshot.json"
KEPT = 2
SUPERSEDED, DIVERGED = "superseded-", "diverged-"  # put aside: no longer, or never, of use
_SHAPE = "slimgrad_model"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot whose every byte was checked.

    Attributes:
        path: its folder.
        step: optimiser steps done.
        bytes_seen: training bytes so far.
        environment: what it was computed on (see `describe_environment`).
    """

    path: Path
    step: int
    bytes_seen: int
    environment: dict[str, Any]


def describe_environment() -> dict[str, Any]:
    """What decides the bits of a computation, beside the program. Where it differs, last bits may."""
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "slimgrad": slimgrad.__version__,
    }


def save_snapshot(
    folder: Path, *, step: int, bytes_seen: int, model: Performer, optimizer: torch.optim.Optimizer
) -> Path:
    """Write a snapshot of this step into `folder`, then remove all but the latest few.

    Raises:
        StorageError: it could not be written. Those before it are untouched.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL}{target.name}"
    with storage_errors(target):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_tensors(partial / MODEL, model.state_dict(), {_SHAPE: json.dumps(asdict(model.config))})
            save_tensors(partial / OPTIMIZER, optimizer_tensors(model, optimizer))
            record = {
                "step": step,
                "bytes_seen": bytes_seen,
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
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


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
        return Snapshot(path=path, **record)
    except OSError as error:
        raise InputError(f"snapshot {path} is damaged: {error.filename}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"snapshot {path} is damaged: {RECORD} cannot be read ({error})") from error


def restore(snapshot: Snapshot, model: Performer, optimizer: torch.optim.Optimizer) -> None:
    """Put a snapshot's parameters and moments into a model and its optimiser.

    Values are copied into tensors that torch allocated, so that they lie where they would in an undisturbed run: some
    kernels choose their path by a tensor's alignment.
    """
    shape, tensors = read_model_file(snapshot.path / MODEL)
    require_shape(model.config, shape, snapshot.path)
    fill(model, tensors, snapshot.path)
    state: dict[int, dict[str, Tensor]] = {}
    numbers = {name: number for number, name in enumerate(_optimizer_order(model, optimizer))}
    for key, value in _read_tensors(snapshot.path / OPTIMIZER)[1].items():
        name, _, moment = key.rpartition(":")
        state.setdefault(numbers[name], {})[moment] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_model_file(path: Path) -> tuple[PerformerConfig, dict[str, Tensor]]:
    """The shape and the parameters in a model's file.

    Raises:
        InputError: no such file, not a safetensors file, or one that slimgrad did not write.
    """
    metadata, tensors = _read_tensors(path)
    try:
        return TypeAdapter(PerformerConfig).validate_json(metadata[_SHAPE]), tensors
    except (KeyError, ValidationError) as error:
        raise InputError(
            f"{path}: expected a model that slimgrad wrote, with its shape in the metadata; found none that fits"
        ) from error


def require_shape(expected: PerformerConfig, found: PerformerConfig, path: Path) -> None:
    """Refuse a model of another shape, and say what differs. How attention is computed (`form`) is no shape."""
    pairs = {name: (value, getattr(found, name)) for name, value in asdict(expected).items() if name != "form"}
    differing = [f"{name} {theirs!r} instead of {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if differing:
        raise InputError(
            f"{path} holds a model of another shape: {', '.join(differing)}. Leave --preset and model.* out to take "
            "its own shape"
        )


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy parameters into a model, in place."""
    own = model.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise InputError(f"{path}: expected the tensors {sorted(own)}, found others or other shapes: {sorted(tensors)}")
    for name, value in tensors.items():
        own[name].copy_(value)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written in place: see `save_snapshot` for how it becomes whole or absent."""
    try:
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, path, metadata)
    except SafetensorError as error:  # it hides the system's error in its text
        raise OSError(str(error)) from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors, named "parameter:moment". Learning rates follow from the step."""
    names = _optimizer_order(model, optimizer)
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{names[number]}:{key}": value for number, values in state.items() for key, value in values.items()}


def _optimizer_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameters' names in the order in which the optimiser numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"{path}: expected a safetensors file, found none. Check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: expected a safetensors file, got: {error}") from error


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _remove(paths: Iterable[Path]) -> None:
    """Remove snapshots; one that is half removed no longer bears a snapshot's name."""
    for path in paths:
        doomed = path.with_name(f"{PARTIAL}{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
