"""Whole models of each kind of state, built on `ops` and `states`, and presets by name."""

from slimgrad.models.cached import Cached
from slimgrad.models.gated import Gated
from slimgrad.models.performer import Performer, PerformerConfig
from slimgrad.models.presets import PRESETS, Preset, get_preset
from slimgrad.models.windowed import Windowed

__all__ = ["PRESETS", "Cached", "Gated", "Performer", "PerformerConfig", "Preset", "Windowed", "get_preset"]
