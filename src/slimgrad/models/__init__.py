"""Whole models of each kind of state, built on `ops` and `states`, and shapes of Performers by name."""

from slimgrad.models.cached import Cached
from slimgrad.models.gated import Gated
from slimgrad.models.performer import Performer, PerformerConfig
from slimgrad.models.published import from_published, read_published, to_published
from slimgrad.models.shapes import SHAPES
from slimgrad.models.windowed import Windowed

__all__ = [
    "SHAPES",
    "Cached",
    "Gated",
    "Performer",
    "PerformerConfig",
    "Windowed",
    "from_published",
    "read_published",
    "to_published",
]
