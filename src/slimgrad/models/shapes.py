"""Shapes of Performers by name: the paper's, and a modern one.

| name | layers | width | heads | source |
|---|---|---|---|---|
| I, II, III, IV | 1, 3, 3, 3 | 1024, 512, 1024, 1024 | width / 64 | paper, section 4.1 |
| copying, ptb, enwik8 | 1, 3, 3 | 256, 512, 1024 | width / 64 | paper, section 4.3 |
| modern | 3 | 128 | 2 | docs/decisions/modern-preset.md |

How each is trained is in `bytelm.presets`.
"""

from __future__ import annotations

from typing import Literal

from slimgrad.models.performer import PerformerConfig


def _published(layers: int, width: int, norm: Literal["output", "pre"] = "output") -> PerformerConfig:
    return PerformerConfig(layers=layers, width=width, heads=width // 64, norm=norm)


SHAPES: dict[str, PerformerConfig] = {
    "I": _published(1, 1024),
    "II": _published(3, 512),
    "III": _published(3, 1024),
    "IV": _published(3, 1024),
    "copying": _published(1, 256, norm="pre"),
    "ptb": _published(3, 512),
    "enwik8": _published(3, 1024),
    "modern": PerformerConfig(
        layers=3, width=128, heads=2, norm="rms", normalize=False, output_projection=True, taps=4, feature_map="elu1"
    ),
}
