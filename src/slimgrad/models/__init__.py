"""Whole models built on ops."""

from slimgrad.models.performer import Performer, PerformerConfig
from slimgrad.models.presets import PRESETS, Preset, get_preset

__all__ = ["PRESETS", "Performer", "PerformerConfig", "Preset", "get_preset"]
