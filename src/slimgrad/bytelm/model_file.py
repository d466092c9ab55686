"""A Performer in a file: its shape is in the file's metadata, so that it can travel alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from slimgrad.errors import InputError
from slimgrad.models.performer import Performer
from slimgrad.models.shapes import PerformerConfig
from slimgrad.runs.tensors import fill, read_metadata, read_tensors

_SHAPE = "slimgrad_model"


def describe_shape(model: Performer) -> dict[str, str]:
    """What a model's file says of itself."""
    return {_SHAPE: json.dumps(asdict(model.config))}


def read_shape(path: Path) -> PerformerConfig:
    """The shape of the model in a file.

    Raises:
        InputError: no such file, not a safetensors file, or one that slimgrad did not write.
    """
    metadata = read_metadata(path)
    try:
        return TypeAdapter(PerformerConfig).validate_json(metadata[_SHAPE])
    except (KeyError, ValidationError) as error:
        raise InputError(
            f"{path}: expected a model that slimgrad wrote, with its shape in the metadata; found none that fits"
        ) from error


def read_model(path: Path) -> Performer:
    """The model in a file. Raises as `read_shape` does, and where its tensors are not those of its shape."""
    shape = read_shape(path)
    with torch.random.fork_rng(devices=[]):
        model = Performer(shape)
    fill(model, read_tensors(path), path)
    return model


def require_shape(expected: PerformerConfig, found: PerformerConfig, path: Path) -> None:
    """Refuse a model of another shape, and say what differs. How attention is computed (`form`) is no shape."""
    pairs = {name: (value, getattr(found, name)) for name, value in asdict(expected).items() if name != "form"}
    differing = [f"{name} {theirs!r} instead of {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if differing:
        raise InputError(
            f"{path} holds a model of another shape: {', '.join(differing)}. Leave --preset and model.* out to take "
            "its own shape"
        )
