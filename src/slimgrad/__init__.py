"""slimgrad: exact gradients of causal sequence models over sequences of any length, in the memory you state.

import slimgrad as sg
result = sg.backward(model, tokens, chunk=4096)    # parameter gradients are in .grad
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimgrad.api import Chunked, backward, evaluate, loss, outputs, plan, token_loss
from slimgrad.budget.plan import Plan
from slimgrad.call.arguments import Result
from slimgrad.call.protocol import CausalModel
from slimgrad.call.segment import Segment
from slimgrad.call.source import Reader
from slimgrad.call.travel import receive_state, send_state
from slimgrad.errors import (
    ConsumedError,
    InputError,
    LossMismatchError,
    MemoryLimitError,
    ModelError,
    NonFiniteError,
    RunError,
    SlimgradError,
    StateMismatchError,
    StorageError,
    SweepError,
)
from slimgrad.gradients.sink import SavedSink
from slimgrad.states.base import State
from slimgrad.states.rows import Growing
from slimgrad.states.sums import PrefixSum
from slimgrad.sweep.program import Event
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.binomial import Binomial
from slimgrad.sweep.schedules.every import Every
from slimgrad.sweep.schedules.keep import Keep, Rebuild
from slimgrad.verification.model import Report, verify
from slimgrad.verification.step import StepReport, verify_step

if TYPE_CHECKING:
    from slimgrad import adapters, hf

__version__ = "0.1.0"

__all__ = [
    "Binomial",
    "CausalModel",
    "Chunked",
    "ConsumedError",
    "Event",
    "Every",
    "Growing",
    "InputError",
    "Keep",
    "LossMismatchError",
    "MemoryLimitError",
    "ModelError",
    "NonFiniteError",
    "Plan",
    "PrefixSum",
    "Reader",
    "Rebuild",
    "Report",
    "Result",
    "RunError",
    "SavedSink",
    "Schedule",
    "Segment",
    "SlimgradError",
    "State",
    "StateMismatchError",
    "StepReport",
    "StorageError",
    "SweepError",
    "adapters",
    "backward",
    "evaluate",
    "hf",
    "loss",
    "outputs",
    "plan",
    "receive_state",
    "send_state",
    "token_loss",
    "verify",
    "verify_step",
]


def __getattr__(name: str) -> Any:
    """`slimgrad.adapters` and `slimgrad.hf`, imported when they are first asked for: the latter needs transformers."""
    if name not in ("adapters", "hf"):
        raise AttributeError(f"module 'slimgrad' has no attribute {name!r}")
    import importlib

    return importlib.import_module(f"slimgrad.{name}")
