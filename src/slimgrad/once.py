"""Backward passes that cannot be differentiated again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from slimgrad.errors import SweepError


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of a `torch.autograd.Function`, below `staticmethod`: differentiating it again raises.

    torch's own `once_differentiable` raises only where the incoming gradient has a graph itself. That of a loss is a
    constant 1: what comes out would be a constant too, and a gradient penalty or a Hessian silently zero.

    What comes out hangs on `ctx.takers`, or on what was saved for the backward pass: whoever asks for a derivative with
    respect to the function's inputs must come by.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():  # within a backward: create_graph was not asked for
            return backward(ctx, *gradients)
        known = getattr(ctx, "takers", None) or ctx.saved_tensors
        inputs = [x for x in (*known, *gradients) if isinstance(x, Tensor) and x.requires_grad]
        with torch.no_grad():
            found = backward(ctx, *gradients)
        every = found if isinstance(found, tuple) else (found,)
        places = [i for i, x in enumerate(every) if isinstance(x, Tensor)]
        marked = _Refusing.apply(len(inputs), *inputs, *(every[i] for i in places))
        merged = list(every)
        for i, x in zip(places, marked, strict=True):
            merged[i] = x
        return tuple(merged) if isinstance(found, tuple) else merged[0]

    return wrapper


class _Refusing(torch.autograd.Function):
    """Hands on what comes after the first `count` tensors; its backward raises."""

    @staticmethod
    def forward(ctx: FunctionCtx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[count:])

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Any:
        raise SweepError(
            "a gradient that was computed in chunks, or by one of slimgrad's own operations, was differentiated again "
            "(create_graph=True: a gradient penalty, a Hessian, a gradient of a gradient); it is exact once. Take the "
            "term that needs second derivatives from plain backpropagation of a model without these operations"
        )
