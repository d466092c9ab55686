"""Named tensors in a safetensors file: reading runs no code, and what is one tensor in memory is stored once."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimgrad.errors import InputError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written in place: see `snapshot.save_snapshot` for how it becomes whole or absent."""
    try:
        save_file(apart(tensors), path, metadata)
    except SafetensorError as error:  # it hides the system's error in its text
        raise OSError(str(error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by its name.

    Raises:
        InputError: no such file, or not a safetensors file.
    """
    with _reading(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """What else a file holds. Raises as `read_tensors` does."""
    with _reading(path) as file:
        return dict(file.metadata() or {})


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name; those that are one tensor (tied weights) under the first of its names.

    Raises:
        InputError: the model keeps something else in its `state_dict`.
    """
    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name}: expected tensors in the model's state_dict, got {type(value).__name__}")
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if not value.numel() or place not in seen:
            seen.add(place)
            found[name] = value
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy what `model_tensors` gave into a model, in place.

    Raises:
        InputError: other tensors, shapes or dtypes.
    """
    own = model_tensors(model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise InputError(f"{path}: expected the tensors {sorted(own)}, found others or other shapes: {sorted(tensors)}")
    for name, value in tensors.items():
        if value.dtype != own[name].dtype:
            raise InputError(f"{path}: expected {name} in {own[name].dtype}, found {value.dtype}")
    for name, value in tensors.items():
        own[name].copy_(value)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous, in memory of its own."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        whole = value.detach().contiguous()
        if whole.untyped_storage().data_ptr() in storages:
            whole = whole.clone()
        storages.add(whole.untyped_storage().data_ptr())
        found[name] = whole
    return found


@contextmanager
def _reading(path: Path) -> Generator[Any]:
    if not path.is_file():
        raise InputError(f"{path}: expected a safetensors file, found none. Check the path")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: expected a safetensors file, got: {error}. Of a run, name the folder") from error
