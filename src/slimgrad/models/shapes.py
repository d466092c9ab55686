"""The shape of a Performer, and shapes by name: the paper's, and a modern one. Plain values: torch is not needed.

| name | layers | width | heads | source |
|---|---|---|---|---|
| I, II, III, IV | 1, 3, 3, 3 | 1024, 512, 1024, 1024 | width / 64 | paper, section 4.1 |
| copying, ptb, enwik8 | 1, 3, 3 | 256, 512, 1024 | width / 64 | paper, section 4.3 |
| modern | 3 | 128 | 2 | docs/decisions/modern-preset.md |

How each is trained is in `bytelm.presets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimgrad.errors import InputError

FEATURE_MAPS = ("square", "abs", "relu", "elu1", "favor")  # those of `ops.feature_maps`
FORMS = ("blocked", "iterative", "prefix_sum", "quadratic", "recurrent")  # those of `ops.linear_attention`


@dataclass(frozen=True, kw_only=True)
class PerformerConfig:
    """A Performer's shape.

    Attributes:
        layers, width, heads: s, d_model and k of the paper.
        feedforward: d_ff; 4 * width where 0.
        vocabulary: symbols; 256 for bytes.
        features: M, features per head; the head's width where 0 (only "favor" can have another number).
        feature_map: one of `FEATURE_MAPS`.
        norm: "output" (layer norm on a sub-layer's output, as published), "pre" (layer norm before it, as published for
            copying), or "rms" (RMS norm before it and before the head).
        normalize: divide by the sum of the weights, as published; else each head's output is divided by its root mean
            square.
        output_projection: a linear map after the heads.
        taps: how many of the latest tokens are embedded at each position, each from a table of its own, and added up;
            1: its own alone.
        form: how attention is computed: "auto" or one of `FORMS`.
    """

    layers: int
    width: int
    heads: int
    feedforward: int = 0
    vocabulary: int = 256
    features: int = 0
    feature_map: str = "square"
    norm: Literal["output", "pre", "rms"] = "output"
    normalize: bool = True
    output_projection: bool = False
    taps: int = 1
    form: str = "auto"

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocabulary", "taps"):
            if getattr(self, name) < 1:
                raise InputError(f"PerformerConfig: {name}={getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise InputError(f"PerformerConfig: width={self.width} is not a multiple of heads={self.heads}")
        if self.width % 4:
            raise InputError(f"PerformerConfig: sinusoids need a width that is a multiple of 4, got {self.width}")
        if self.feature_map not in FEATURE_MAPS:
            raise InputError(f"PerformerConfig: feature_map={self.feature_map!r}, expected one of {list(FEATURE_MAPS)}")
        if self.form != "auto" and self.form not in FORMS:
            raise InputError(f"PerformerConfig: form={self.form!r}, expected 'auto' or one of {list(FORMS)}")
        if self.features and self.feature_map != "favor" and self.features != self.head_width:
            raise InputError(
                f"PerformerConfig: features={self.features} differs from the head's width {self.head_width}, which "
                f"{self.feature_map!r} cannot change; only 'favor' can"
            )

    @property
    def head_width(self) -> int:
        """d of the paper: width / heads."""
        return self.width // self.heads

    @property
    def num_features(self) -> int:
        """M of the paper."""
        return self.features or self.head_width

    @property
    def feedforward_width(self) -> int:
        """d_ff of the paper."""
        return self.feedforward or 4 * self.width


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
