"""The loss of a language model's head without its logits: piece by piece, gradients taken on the way forward.

Logits are `[tokens, vocabulary]`, often the largest tensor of all. A piece of tokens gives its loss and the gradients
of hidden states and head together, so no logits are kept and none are computed twice. What is kept for the backward
pass are those gradients, scaled once by what comes in.

Cost: the head's three products, as in plain backpropagation; memory: one piece of logits, and the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import get_gradient_edge
from transformers.utils.generic import ModelOutput

from slimgrad.errors import ConsumedError, InputError, ModelError
from slimgrad.gradients.graph import find_strangers
from slimgrad.once import differentiable_once

PIECE = 512  # tokens whose logits exist at once
_ROWS = 16_384  # of the weight, whose gradient is made at once in 16 bits
IGNORED = -100

LogitsOf = Callable[[Tensor], Tensor]


def linear_loss(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """The sum of the cross-entropies of a linear head.

    Args:
        hidden: `[tokens, width]`.
        targets: `[tokens]`, -100 is ignored.
        head: `logits = hidden W^T + b`.

    Returns:
        The sum in nats, 0-d, float32 (float64 for a float64 head).
    """
    weight, bias = head.weight, cast("Tensor | None", head.bias)
    if not torch.is_grad_enabled():  # a Function is told what requires gradients, not whether they are wanted
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return cast(Tensor, _LinearLoss.apply(hidden, targets, weight, bias))


def loss_in_pieces(hidden: Tensor, targets: Tensor, logits_of: LogitsOf, parameters: Sequence[Tensor]) -> Tensor:
    """The same for any head.

    Args:
        hidden: `[batch, time, width]`.
        targets: `[batch, time]`.
        logits_of: the head, from a piece of hidden states to logits.
        parameters: what of it takes gradients.
    """
    return cast(Tensor, _LossInPieces.apply(hidden, targets, logits_of, *parameters))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context = cast(Any, ctx)
        wants_hidden, _, wants_weight, wants_bias = cast("tuple[bool, ...]", context.needs_input_grad)
        dtype = F.linear(hidden[:0].to(weight.dtype), weight, bias).dtype  # what autocast makes of it
        cast_weight = weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if wants_weight else None
        d_bias = None if bias is None or not wants_bias else torch.zeros_like(bias, dtype=_wide(bias.dtype))
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, hidden.shape[0], PIECE):
            x, goal = hidden[start : start + PIECE].to(dtype), targets[start : start + PIECE]
            counts = goal != IGNORED
            index = goal.masked_fill(~counts, 0)[:, None]  # any other that is no token raises
            logits = F.linear(x, cast_weight, None if bias is None else bias.to(dtype))
            logits = logits.to(_wide(dtype))
            logits -= logits.logsumexp(-1, keepdim=True)
            total -= (logits.gather(1, index)[:, 0] * counts).sum(dtype=torch.float64)
            d_logits = logits.exp_()
            d_logits.scatter_add_(1, index, torch.full_like(index, -1, dtype=d_logits.dtype))
            d_logits.mul_(counts[:, None])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                d_hidden[start : start + PIECE] = d_logits @ cast_weight
            if d_weight is not None:
                _add_product(d_weight, d_logits, x)
        context.takers = _way_to(hidden), weight, bias
        context.save_for_backward(d_hidden, d_weight, d_bias)
        context.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total.to(_wide(dtype))

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,), context = grad_outputs, cast(Any, ctx)
        _refuse_second(context)
        d_hidden, d_weight, d_bias = cast("tuple[Tensor | None, ...]", context.saved_tensors)
        of_weight, of_bias = context.dtypes
        return (
            _scaled(d_hidden, scale),
            None,
            None if d_weight is None else _scaled(d_weight, scale).to(of_weight),
            None if d_bias is None else _scaled(d_bias, scale).to(of_bias),
        )


def _way_to(x: Tensor) -> Tensor:
    """Nothing of `x`, on the same graph: what a second derivative has to come by, without holding `x`."""
    with torch.enable_grad():
        return x[:0].clone()


def _add_product(total: Tensor, d_logits: Tensor, x: Tensor) -> None:
    """`total += d_logits^T x`; in 16 bits, some rows at a time are widened and added."""
    if total.dtype == x.dtype:
        total.addmm_(d_logits.t(), x)
        return
    for start in range(0, total.shape[0], _ROWS):
        total[start : start + _ROWS] += d_logits[:, start : start + _ROWS].t() @ x


def _scaled(x: Any, scale: Tensor) -> Any:
    """In place, since there is one backward pass."""
    return None if x is None else x.mul_(scale)


def _refuse_second(context: Any) -> None:
    if getattr(context, "is_spent", False):
        raise ConsumedError(
            "backward was called a second time on one loss, whose gradients went with the first. Expected one backward "
            "each: add losses up before calling it, or compute them again"
        )
    context.is_spent = True


class _LossInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, targets: Tensor, logits_of: LogitsOf, *parameters: Tensor) -> Tensor:
        context = cast(Any, ctx)
        wants_hidden = cast("tuple[bool, ...]", context.needs_input_grad)[0]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        sums: list[Tensor | None] = [None] * len(parameters)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        dtype = torch.float32
        length = max(1, PIECE // hidden.shape[0])
        for start in range(0, hidden.shape[1], length):
            span = slice(start, start + length)
            with torch.set_grad_enabled(wants_hidden or bool(parameters)):
                # as one block: of a strided piece some heads round twice
                x = hidden[:, span].detach().contiguous().requires_grad_(wants_hidden)
                logits = logits_of(x)
                dtype = _wide(logits.dtype)
                logits, goal = logits.to(dtype).flatten(0, 1), targets[:, span].flatten()
                loss = F.cross_entropy(logits, goal, ignore_index=IGNORED, reduction="sum")
            total += loss.detach().to(total.dtype)
            if not loss.requires_grad:
                continue
            _refuse_strangers(loss, [x, *parameters] if wants_hidden else parameters)
            found = torch.autograd.grad(loss, [x, *parameters] if wants_hidden else parameters, allow_unused=True)
            if d_hidden is not None:
                d_hidden[:, span] = found[0]
            of_parameters = cast("tuple[Tensor | None, ...]", found[1:] if wants_hidden else found)
            for index, gradient in enumerate(of_parameters):
                if gradient is not None:
                    known = sums[index]
                    sums[index] = gradient.to(_wide(gradient.dtype)) if known is None else known.add_(gradient)
        context.takers = _way_to(hidden), *parameters
        context.save_for_backward(d_hidden, *sums)
        context.dtypes = [p.dtype for p in parameters]
        return total.to(dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,), context = grad_outputs, cast(Any, ctx)
        _refuse_second(context)
        d_hidden, *sums = cast("tuple[Tensor | None, ...]", context.saved_tensors)
        found = [
            None if x is None else _scaled(x, scale).to(dtype) for x, dtype in zip(sums, context.dtypes, strict=True)
        ]
        return _scaled(d_hidden, scale), None, None, *found


def _refuse_strangers(loss: Tensor, takers: Sequence[Tensor]) -> None:
    """Raise if the graph of a piece ends in a leaf whose gradient would be lost."""
    strangers, _ = find_strangers([loss], [get_gradient_edge(x) for x in takers])
    if strangers:
        raise ModelError(
            f"the head's loss depends on a tensor of shape {list(strangers[0].shape)} that requires a gradient and is "
            "no parameter of the model (a hook, a module wrapped around the head): in pieces its gradient would be "
            "lost. Make it a parameter of the model, or compute the loss from the logits"
        )


class NoLogitsError(InputError, AttributeError):
    """Logits that were never there; for `hasattr` they are absent."""


class NoCache:
    """In the place of a cache in the outputs of a pass in chunks: whoever hands it on, or reads it, is told."""

    def __repr__(self) -> str:
        return "NoCache()"

    def __getattr__(self, name: str) -> Any:
        raise NoCacheError(
            "a pass in chunks returns no cache to go on from: a gradient through it is not supported. Expected the "
            "whole sequence in one call, in as many chunks as it needs; or slimgrad.hf.disable(model)"
        )


class NoCacheError(InputError, AttributeError):
    """A cache that was never there."""


@dataclass
class LossOutput(ModelOutput):
    """What a causal model's forward returns in training: the loss. Its logits were never all there at once.

    Attributes:
        loss: 0-d.
        past_key_values: None or a `NoCache`.
        hidden_states, attentions: None, as in transformers' own outputs.
    """

    loss: Tensor | None = None
    past_key_values: NoCache | None = None
    hidden_states: None = None
    attentions: None = None

    def __getitem__(self, k: Any) -> Any:
        past_the_loss = k == "logits" if isinstance(k, str) else k not in (0, slice(1), slice(0, 1))
        return self.logits if past_the_loss else super().__getitem__(k)

    @property
    def logits(self) -> Any:
        """Not there: says so."""
        raise NoLogitsError(
            "the logits of a forward with labels are not kept in training, where the head is taken in pieces. Expected "
            "them from a forward in eval mode, without labels, or after slimgrad.hf.disable(model)"
        )
