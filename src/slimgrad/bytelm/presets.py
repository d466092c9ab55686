"""Runs by name: the paper's, and a modern one, with the shapes of `models.shapes`.

| preset | L | learning rate | steps | source |
|---|---|---|---|---|
| I, II, III, IV | 8192, 1024, 4096, 16384 | | | paper, section 4.1 |
| copying | 512 | 1e-2, then 1e-3 | 15,000 | paper, section 4.3 |
| ptb, enwik8 | 1024, 4096 | 1e-4, 2e-4 | 30,000, 100,000 | paper, section 4.3 |
| modern | 16384 | 7e-3 | 1,600 | docs/decisions/modern-preset.md |

The paper's train as published: Adam with its default betas, no weight decay, no warm-up, no clipping, a constant
learning rate (copying: a tenth after 10,000 steps), one sequence a step, consecutive windows.
"""

from __future__ import annotations

from typing import Any

from slimgrad.bytelm.config import TrainConfig
from slimgrad.errors import InputError
from slimgrad.models.shapes import SHAPES

_ADAM: dict[str, Any] = {
    "windows": "consecutive", "warmup": 0.0, "decay": "constant", "weight_decay": 0.0, "betas": (0.9, 0.999),
    "clip_norm": None,
}  # fmt: skip
_FEW = 300  # steps, where the paper measures and does not train


def _as_published(name: str, **numbers: Any) -> TrainConfig:
    return TrainConfig(model=SHAPES[name], **(_ADAM | numbers))


PRESETS: dict[str, TrainConfig] = {
    "I": _as_published("I", length=8192, learning_rate=1e-4, chunk=1024, steps=_FEW),
    "II": _as_published("II", length=1024, learning_rate=1e-4, chunk=256, steps=_FEW),
    "III": _as_published("III", length=4096, learning_rate=2e-4, chunk=512, steps=_FEW),
    "IV": _as_published("IV", length=16384, learning_rate=2e-4, chunk=512, steps=_FEW),
    "copying": _as_published(
        "copying", task="copying", length=512, learning_rate=1e-2, decay="drop", chunk=128, steps=15_000
    ),
    "ptb": _as_published("ptb", length=1024, learning_rate=1e-4, chunk=512, steps=30_000),
    "enwik8": _as_published("enwik8", length=4096, learning_rate=2e-4, chunk=2048, steps=100_000),
    "modern": TrainConfig(
        model=SHAPES["modern"], length=16384, first_length=256, learning_rate=7e-3, chunk=512, steps=1600
    ),
}


DEFAULT_PRESET = "modern"


def get_preset(name: str) -> TrainConfig:
    """The preset of that name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
