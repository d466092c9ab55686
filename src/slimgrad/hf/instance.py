"""A forward on a module's instance, in the place of its class' own; nothing in transformers is replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

PLACE = "_slimgrad"  # where a module keeps its forward of ours, also below what somebody has put around it since


class InstanceForward:
    """A forward on an instance: an object of a class, so that copies and pickles of the module carry their own.

    Attributes:
        module: whose forward it is.
        previous: what was on the instance before (Accelerate, TRL), or None for the class' own.
        active: False after `disable` where somebody wrapped it.
        evaluates: whether calls outside of training are swept as well.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.previous, self.active = module, module.__dict__.get("forward"), True
        self.evaluates = False

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a function of the module, which is what Accelerate wraps and binds anew: it holds nothing, so that a copy
        of the module runs its own.
        """

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return module.__dict__[PLACE](*args, **kwargs)

        forward.__dict__["__signature__"] = inspect.signature(type(self.module).forward)
        return forward

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was replaced."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return cast(Any, type(self.module)).forward(self.module, *args, **kwargs)

    def is_training(self) -> bool:
        """Whether this call is one to sweep."""
        return self.active and (self.evaluates or (self.module.training and torch.is_grad_enabled()))

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**self.__signature__.bind_partial(*args).arguments, **kwargs}


def is_bare(module: Any) -> bool:
    """Whether nobody has put something around a module (beside us)."""
    around = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not around and module.__dict__.get("forward") is module.__dict__.get(PLACE)
