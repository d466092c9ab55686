"""Configurations by name: the paper's, and the modern ones.

| preset | L | layers | width | heads | learning rate | steps | source |
|---|---|---|---|---|---|---|---|
| I, II, III, IV | 8192, 1024, 4096, 16384 | 1, 3, 3, 3 | 1024, 512, 1024, 1024 | width / 64 | | | paper, section 4.1 |
| copying | 512 | 1 | 256 | 4 | 1e-2, then 1e-3 | 15,000 | paper, section 4.3 |
| ptb, enwik8 | 1024, 4096 | as II, III | | | 1e-4, 2e-4 | 30,000, 100,000 | paper, section 4.3 |
| modern | 16384 | 3 | 128 | 2 | 7e-3 | 1,600 | docs/decisions/modern-preset.md |

The paper's train as published: Adam with its default betas, no weight decay, no warm-up, no clipping, a constant
learning rate (copying: a tenth after 10,000 steps), one sequence a step, consecutive windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from slimgrad.errors import InputError
from slimgrad.models.performer import PerformerConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model's shape, and what it is trained on and how.

    Attributes:
        model: the shape.
        length: tokens of one training sequence (L).
        learning_rate: the highest.
        chunk: a memory chunk that suits it.
        steps: training steps, one sequence each.
        first_length: tokens of the first training sequences, from where the length doubles; 0: all have `length`.
        task, windows, warmup, decay, weight_decay, betas, clip_norm: as in `bytelm.TrainConfig`.
    """

    model: PerformerConfig
    length: int
    learning_rate: float
    chunk: int
    steps: int = 300
    first_length: int = 0
    task: Literal["text", "copying"] = "text"
    windows: Literal["shuffled", "consecutive"] = "shuffled"
    warmup: float = 0.05
    decay: Literal["cosine", "constant", "drop"] = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = 1.0


def _published(layers: int, width: int, norm: str = "output") -> PerformerConfig:
    return PerformerConfig(layers=layers, width=width, heads=width // 64, norm="pre" if norm == "pre" else "output")


_ADAM: dict[str, Any] = {
    "windows": "consecutive", "warmup": 0.0, "decay": "constant", "weight_decay": 0.0, "betas": (0.9, 0.999),
    "clip_norm": None,
}  # fmt: skip


def _as_published(model: PerformerConfig, **numbers: Any) -> Preset:
    return Preset(model=model, **(_ADAM | numbers))


PRESETS: dict[str, Preset] = {
    "I": _as_published(_published(1, 1024), length=8192, learning_rate=1e-4, chunk=1024),
    "II": _as_published(_published(3, 512), length=1024, learning_rate=1e-4, chunk=256),
    "III": _as_published(_published(3, 1024), length=4096, learning_rate=2e-4, chunk=512),
    "IV": _as_published(_published(3, 1024), length=16384, learning_rate=2e-4, chunk=512),
    "copying": _as_published(
        _published(1, 256, norm="pre"),
        length=512,
        learning_rate=1e-2,
        chunk=128,
        steps=15_000,
        task="copying",
        decay="drop",
    ),
    "ptb": _as_published(_published(3, 512), length=1024, learning_rate=1e-4, chunk=512, steps=30_000),
    "enwik8": _as_published(_published(3, 1024), length=4096, learning_rate=2e-4, chunk=2048, steps=100_000),
    "modern": Preset(
        model=PerformerConfig(
            layers=3,
            width=128,
            heads=2,
            norm="rms",
            normalize=False,
            output_projection=True,
            taps=4,
            feature_map="elu1",
        ),
        length=16384,
        first_length=256,
        learning_rate=7e-3,
        chunk=512,
        steps=1600,
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of that name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
