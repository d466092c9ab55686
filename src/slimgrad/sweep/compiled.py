"""Where a sweep meets torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def not_traced(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which a compiled model calls as it is: Dynamo does not look into it.

    It would compile what is inside for every state, find nothing to gain, and give up at its recompilation limit. While
    Dynamo is not loaded nothing is asked of it, because loading it takes a second.
    """
    hidden = torch._disable_dynamo(function)  # pyright: ignore  # loads Dynamo when it is first called

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return (hidden if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call
