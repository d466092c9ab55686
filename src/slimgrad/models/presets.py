"""Configurations by name: the paper's, and the modern ones.

| preset | L | layers | width | heads | learning rate | source |
|---|---|---|---|---|---|---|
| I, II, III, IV | 8192, 1024, 4096, 16384 | 1, 3, 3, 3 | 1024, 512, 1024, 1024 | width / 64 | | paper, section 4.1 |
| copying | 512 | 1 | 256 | 4 | 1e-2 | paper, section 4.3 |
| ptb, enwik8 | 1024, 4096 | as II, III | | | 1e-4, 2e-4 | paper, section 4.3 |
| modern | 16384 | 3 | 128 | 2 | 7e-3 | docs/decisions/modern-preset.md |
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    model: PerformerConfig
    length: int
    learning_rate: float
    chunk: int
    steps: int = 300
    first_length: int = 0


def _published(layers: int, width: int, norm: str = "output") -> PerformerConfig:
    return PerformerConfig(layers=layers, width=width, heads=width // 64, norm="pre" if norm == "pre" else "output")


PRESETS: dict[str, Preset] = {
    "I": Preset(model=_published(1, 1024), length=8192, learning_rate=1e-4, chunk=1024),
    "II": Preset(model=_published(3, 512), length=1024, learning_rate=1e-4, chunk=256),
    "III": Preset(model=_published(3, 1024), length=4096, learning_rate=2e-4, chunk=512),
    "IV": Preset(model=_published(3, 1024), length=16384, learning_rate=2e-4, chunk=512),
    "copying": Preset(model=_published(1, 256, norm="pre"), length=512, learning_rate=1e-2, chunk=128),
    "ptb": Preset(model=_published(3, 512), length=1024, learning_rate=1e-4, chunk=512),
    "enwik8": Preset(model=_published(3, 1024), length=4096, learning_rate=2e-4, chunk=2048),
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
