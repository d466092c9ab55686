"""Three ways to one gradient: chunk by chunk, with each layer computed twice, or plainly.

| method | memory over the length L | time |
|---|---|---|
| "chunked" | constant: one chunk's graph | 1.1 to 1.4 of plain |
| "checkpoint" | linear: each layer's input, and one layer's graph | about 4/3 of plain |
| "plain" | linear: every layer's graph | 1 |

They differ in the order in which numbers are added, so in the last bits alone. Beside the first, which the library is
about, the others are here to be compared with, and to show that a run may change from one to another at any step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from torch.utils.checkpoint import checkpoint

from slimgrad.api import backward
from slimgrad.bytelm.config import Method
from slimgrad.data import Batch, whole
from slimgrad.models.performer import Performer
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.verification.reference import plain_backward


def add_gradient(
    model: Performer,
    batch: Batch,
    *,
    method: Method,
    chunk: int,
    schedule: Schedule | None,
    normalizer: float,
    carry_out: Callable[..., float] | None = None,
) -> float:
    """Add a batch's gradient to every parameter's `.grad`, and return its loss: both over `normalizer`.

    Args:
        model: a Performer.
        batch: sequences of one length, or whole documents.
        method: see the module.
        chunk, schedule: for "chunked".
        normalizer: what the summed loss is divided by: the targets of the whole step, for their mean.
        carry_out: for "chunked" with one sequence: what does it in place of `backward`, to the same bits.
    """
    states = [model.initial_state(size) for size, _ in batch.shapes]  # here, so that all methods draw the same features
    if method == "chunked":
        state = states if isinstance(batch.inputs, list) else states[0]
        how: dict[str, Any] = {"chunk": chunk, "schedule": schedule, "normalizer": normalizer, "state": state}
        if carry_out is not None:
            return carry_out(model, batch.inputs, batch.targets, **how)
        return float(backward(model, batch.inputs, batch.targets, **how).loss)
    targets = batch.targets if isinstance(batch.targets, list) else [batch.targets] * len(states)
    with layers_computed_twice(model) if method == "checkpoint" else nullcontext():
        return sum(
            plain_backward(model, whole(inputs), goal, state=state, normalizer=normalizer)
            for inputs, goal, state in zip(batch.sequences, targets, states, strict=True)
        )


@contextmanager
def layers_computed_twice(model: Performer) -> Generator[None]:
    """Within the block each layer keeps its input alone, and runs a second time in the backward pass."""

    def twice(inner: Any) -> Any:
        return functools.partial(checkpoint, inner, use_reentrant=False)

    layers = list(model.layers)
    try:
        for layer in layers:
            layer.forward = twice(layer.forward)
        yield
    finally:
        for layer in layers:
            cast(Any, vars(layer)).pop("forward", None)
