"""The heart: two sweeps over the chunks of a sequence. Tensors and callables only; no model, no data."""

from slimgrad.sweep.run import ChunkResult, Event, Program, Run
from slimgrad.sweep.schedule import Action, Binomial, Every, Keep, Kind, Rebuild, Schedule
from slimgrad.sweep.state import Growing, PrefixSum

__all__ = [
    "Action",
    "Binomial",
    "ChunkResult",
    "Event",
    "Every",
    "Growing",
    "Keep",
    "Kind",
    "PrefixSum",
    "Program",
    "Rebuild",
    "Run",
    "Schedule",
]
