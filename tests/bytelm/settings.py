"""A run that takes a second, on text that can be learnt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from slimgrad.bytelm import Row, RunFolder, TrainConfig, train
from slimgrad.bytelm.presets import get_preset
from slimgrad.data import Corpus, Documents
from slimgrad.models import PerformerConfig
from slimgrad.runs.snapshot import list_snapshots

TINY_MODEL: PerformerConfig = dataclasses.replace(get_preset("modern").model, layers=2, width=16, heads=2)
TEXT = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8)
SNAPSHOT_FILES = ("model.safetensors", "optimizer.safetensors", "snapshot.json")
# what a clock or the allocator decides, not the run
UNTIMED = ("seconds", "bytes_per_second", "resident_bytes")


def corpus(text: torch.Tensor = TEXT) -> Corpus:
    return Corpus(name="fox", source="a test", text=Documents([text]))


def documents(*lengths: int) -> Corpus:
    return Corpus(name="foxes", source="a test", text=Documents([TEXT[:length] for length in lengths]))


def tiny(**overrides: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": TINY_MODEL,
        "length": 97,
        "chunk": 32,
        "steps": 30,
        "learning_rate": 2e-2,
        "validation": "end",
        "validation_bytes": 200,
        "eval_every": 10,
    }
    return TrainConfig(**(fields | overrides))


def timeless(rows: list[Row]) -> list[dict[str, Any]]:
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in UNTIMED} for row in rows]


def whole(path: Path, config: TrainConfig, text: Corpus | None) -> list[Row]:
    """A run in a new folder, undisturbed."""
    with RunFolder.create(path, "fox", {"config": config.to_dict()}) as folder:
        return train(config, text, run=folder).rows


def going_on(path: Path, text: Corpus | None, **changes: Any) -> list[Row]:
    """A run taken up again, to its end."""
    with RunFolder.reopen(path) as folder:
        return train(folder.config.replace(**changes), text, run=folder).rows


def last_snapshot(path: Path) -> dict[str, bytes]:
    """The files of a run's latest snapshot."""
    latest = list_snapshots(path / "snapshots")[0]
    return {name: (latest / name).read_bytes() for name in SNAPSHOT_FILES}


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
