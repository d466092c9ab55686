"""slimgrad: exact gradients of causal sequence models over sequences of any length, in the memory you state.

import slimgrad as sg
result = sg.backward(model, tokens, chunk=4096)    # parameter gradients are in .grad
"""

from slimgrad.api import Chunked, backward, evaluate, loss, token_loss
from slimgrad.call import Result
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
from slimgrad.protocol import CausalModel
from slimgrad.step_verification import StepReport, verify_step
from slimgrad.sweep import Binomial, Event, Every, Growing, Keep, PrefixSum, Rebuild, Schedule
from slimgrad.verification import Report, verify

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
    "PrefixSum",
    "Rebuild",
    "Report",
    "Result",
    "RunError",
    "Schedule",
    "SlimgradError",
    "StateMismatchError",
    "StepReport",
    "StorageError",
    "SweepError",
    "backward",
    "evaluate",
    "loss",
    "token_loss",
    "verify",
    "verify_step",
]
