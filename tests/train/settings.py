"""A run that takes a second, on text that can be learnt."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from slimgrad.models import PerformerConfig, get_preset
from slimgrad.train import TrainConfig

TINY_MODEL: PerformerConfig = dataclasses.replace(get_preset("modern").model, layers=2, width=16, heads=2)
TEXT = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8)


def tiny(**overrides: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": TINY_MODEL,
        "length": 97,
        "chunk": 32,
        "steps": 30,
        "learning_rate": 2e-2,
        "validation_bytes": 200,
        "validations": 3,
    }
    return TrainConfig(**(fields | overrides))
