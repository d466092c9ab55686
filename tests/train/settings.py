"""A run that takes a second, on text that can be learnt."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from slimgrad.data import Corpus, Documents
from slimgrad.models import PerformerConfig, get_preset
from slimgrad.train import Row, TrainConfig

TINY_MODEL: PerformerConfig = dataclasses.replace(get_preset("modern").model, layers=2, width=16, heads=2)
TEXT = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8)
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
        "validation_bytes": 200,
        "eval_every": 10,
    }
    return TrainConfig(**(fields | overrides))


def timeless(rows: list[Row]) -> list[dict[str, Any]]:
    return [{k: v for k, v in dataclasses.asdict(row).items() if k not in UNTIMED} for row in rows]
