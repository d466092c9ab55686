"""A module's forward, run by a model's own code except for one function that the code calls."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

from torch import nn

from slimgrad.errors import ModelError
from slimgrad.hf.cache import FunctionalCache


class MendedForward(ABC):
    """Put on a module's instance; the class' own forward, unless it is handed a sweep's cache.

    It stays on the module between `enable` and `disable`, since activation checkpointing runs the module once more
    during the backward pass. Copies and pickles of the module carry their own.

    Args:
        module: whose forward it is.
        calls: the name of the global function that is replaced while the module's forward runs for a sweep.
    """

    def __init__(self, module: nn.Module, calls: str) -> None:
        self.module, self.calls = module, calls
        if calls not in self._own().__code__.co_names:
            raise ModelError(
                f"{type(module).__name__}.forward does not call {calls}, which slimgrad mends; expected the code of a "
                "version of transformers that it was written for (see docs/huggingface-models.md)"
            )

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def _own(self) -> FunctionType:
        return cast(FunctionType, inspect.unwrap(cast(Any, type(self.module)).forward))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, FunctionalCache)), None)
        if cache is None:
            return cast(Any, type(self.module)).forward(self.module, *args, **kwargs)
        own = self._own()
        names = {**own.__globals__, self.calls: self.replaced(own.__globals__[self.calls], cache)}
        function = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        function.__kwdefaults__ = own.__kwdefaults__
        return function(self.module, *args, **kwargs)

    @abstractmethod
    def replaced(self, function: Callable[..., Any], cache: FunctionalCache) -> Callable[..., Any]:
        """What is called instead of `function`."""


def put_on(base: nn.Module, kind: type[MendedForward], calls: str) -> int:
    """Put a forward of `kind` on every module of `base` whose own calls `calls`; how many."""
    count = 0
    for module in base.modules():
        own = inspect.unwrap(cast(Any, type(module)).forward)
        if calls in getattr(getattr(own, "__code__", None), "co_names", ()):
            count += 1
            if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], MendedForward):
                raise ModelError(f"{type(module).__name__} has a forward of somebody else's; expected its class' own")
            module.forward = kind(module, calls)
    return count
