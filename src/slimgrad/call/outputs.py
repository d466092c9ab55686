"""Tensors whose backward is the reverse sweep: a model's outputs, every token's loss, or one loss.

The first sweep runs every chunk with its head and collects; autograd then holds a node that goes back over the chunks.
Cotangents that are absent stay absent: an output that no loss reads costs nothing on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from slimgrad.call.arguments import Call, Started
from slimgrad.call.guard import CalledWith
from slimgrad.call.parallel import one_thread_at_a_time
from slimgrad.errors import ConsumedError
from slimgrad.once import differentiable_once
from slimgrad.sweep.run import Cotangents, everywhere
from slimgrad.sweep.turn import has_own_thread, in_autograds_thread


def loss_of(call: Call) -> Tensor:
    """The loss over all sequences: a 0-d tensor."""
    return _swept(call)[0]


def outputs_of(call: Call) -> list[list[Tensor]]:
    """For each sequence what its chunks were collected to along time: `[batch, time, ...]` each."""
    found = iter(_swept(call))
    return [[next(found) for _ in one.collected.differentiable] for one in call.sequences]


def _swept(call: Call) -> tuple[Tensor, ...]:
    """Differentiable where gradients are wanted; else from a plain pass in chunks."""
    wanted = torch.is_grad_enabled()
    if wanted and call.takers():
        return cast("tuple[Tensor, ...]", _Swept.apply(call, *call.takers()))
    for index in range(len(call.sequences)):
        call.sequences[index].takes_nothing = wanted
        started = call.start(index, differentiates=wanted, to_end=wanted)
        started.run.forward(head=True)
        started.run.progress.close()
    return _collected(call)


def _collected(call: Call) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for one in call.sequences:
        found += one.collected.along
        one.collected.along = []  # whoever holds the outputs holds them alone
    return tuple(found) or (call.total_loss(),)


class _Swept(torch.autograd.Function):
    """The forward sweep as forward, the reverse sweep as backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: Call, *takers: Tensor) -> tuple[Tensor, ...]:
        context = cast(Any, ctx)
        with one_thread_at_a_time(call.model):
            started = context.started = list[Started]()
            for index in range(len(call.sequences)):  # one by one, since a first state may leave something on the model
                started.append(call.start(index, to_end=True))
                started[-1].run.forward(head=True)
            call.refuse_gathered()
        context.call, context.called_with = call, CalledWith(call.model, [*call.given, *takers])
        context.takers = takers
        ctx.set_materialize_grads(False)
        found, differentiable = _collected(call), [x for one in call.sequences for x in one.collected.differentiable]
        constant = [x for x, has_graph in zip(found, differentiable, strict=False) if not has_graph]
        ctx.mark_non_differentiable(*constant)
        return found

    @staticmethod
    @differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        context = cast(Any, ctx)
        call = cast("Call | None", context.call)
        if call is None:
            raise ConsumedError(
                "backward was called a second time on one chunked loss (or outputs), whose states went with the first. "
                "Expected one backward each: add losses up before calling it, or compute them again"
            )
        started, called_with = cast("list[Started]", context.started), cast(CalledWith, context.called_with)
        # a loss that is kept holds nothing
        context.call = context.started = context.called_with = context.takers = None
        initial_grads, devices = list[Any](), [g.device for g in grad_outputs if g is not None]
        here = next((device for device in devices if has_own_thread(device)), torch.device("cpu"))
        # within torch.inference_mode a backward works in plain PyTorch as well
        with (
            torch.inference_mode(False),
            in_autograds_thread(here),
            one_thread_at_a_time(call.model),
            called_with.restored(),
        ):
            given = [g.clone() if g is not None and g.is_inference() else g for g in grad_outputs]
            coming = iter(given)
            for one in started:
                along = [next(coming) for _ in one.program.collected.differentiable]
                if along and all(g is None for g in along):  # a document that no loss reads
                    one.run.progress.close()
                    initial_grads.append(one.run.progress.adjoint())
                    continue
                if along:
                    initial_grads.append(one.reverse(_slices(along)))
                else:  # a sum
                    cotangent = None if given[0] is None else given[0] * call.loss_grad
                    initial_grads.append(one.reverse(everywhere(cotangent)))
        return None, *call.gradients(initial_grads)


def _slices(along: Sequence[Tensor | None]) -> Cotangents:
    """From a span to its parts of cotangents along time."""
    return lambda span: [None if g is None else g[:, span.start : span.stop] for g in along]
