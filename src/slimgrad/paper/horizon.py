"""Exact against truncated gradients, on a task that needs a memory as long as the sequence.

The first token is one of eight symbols, noise follows, and at the last token the symbol is asked for. A gated
recurrence reads in chunks. Exact gradients reach the first token from the last, however many chunks lie between.
Truncated ones, as trainers that detach the state between chunks have them, end at the edge of the last chunk: nothing
tells the model to write the symbol down. Same model, seed, data and optimiser; within one chunk the two are the same
computation.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgrad.api import backward, evaluate
from slimgrad.data.batches import IGNORED
from slimgrad.models import Gated
from slimgrad.paper.programme import Point, Row

EXPERIMENT = "horizon"
CHUNK = 64
SYMBOLS = 8
_VOCABULARY = 32  # the question, the symbols, noise
_BATCH, _TESTED, _WIDTH = 16, 512, 16
_GATE_BIAS = 6.0  # a memory of about 400 tokens to begin with
_RATE = 1e-2
_Gradient = Literal["exact", "truncated"]


def horizon_points(*, quick: bool = False) -> list[Point]:
    """Both gradients at every horizon, from one chunk to 16, with three seeds."""
    horizons = (64, 128) if quick else tuple(CHUNK << i for i in range(5))
    steps, seeds = (150, 1) if quick else (300, 3)
    return [
        Point(
            experiment=EXPERIMENT,
            name=f"{gradient} {horizon} seed{seed}",
            function=f"{__name__}:learn",
            task={"gradient": gradient, "horizon": horizon, "steps": steps, "seed": seed},
            seconds=2 + steps * horizon * 3e-4,
        )
        for horizon, seed, gradient in itertools.product(horizons, range(seeds), ("exact", "truncated"))
    ]


def learn(*, gradient: _Gradient, horizon: int, steps: int, seed: int) -> dict[str, Any]:
    """Train, then ask: `accuracy` on sequences not seen, the `losses` in nats in groups of steps, and `seconds`."""
    torch.manual_seed(seed)
    model = Gated(width=_WIDTH, vocabulary=_VOCABULARY, gate_bias=_GATE_BIAS)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        tokens, targets = _sequences(_BATCH, horizon, generator)
        losses.append(add_gradient(model, tokens, targets, gradient))
        optimizer.step()
    seconds = time.perf_counter() - began
    tokens, targets = _sequences(_TESTED, horizon, torch.Generator().manual_seed(-1))
    found = evaluate(model, tokens, targets, chunk=CHUNK, loss_fn=_right)
    group = math.ceil(steps / 50)
    means = [sum(part) / len(part) for part in (losses[i : i + group] for i in range(0, steps, group))]
    return {"accuracy": float(found.metrics["right"]) / _TESTED, "losses": means, "seconds": seconds}


def add_gradient(model: Gated, tokens: Tensor, targets: Tensor, gradient: _Gradient) -> float:
    """Add one batch's gradient in chunks of `CHUNK`: exact, or with the state detached between chunks."""
    if gradient == "exact":
        return float(backward(model, tokens, targets, chunk=CHUNK).loss)
    state, loss = None, 0.0
    for inputs, wanted in zip(tokens.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
        result = backward(model, inputs, wanted, chunk=CHUNK, normalizer=len(tokens), state=state)
        state, loss = result.final_state, loss + float(result.loss)
    return loss


def compare_horizons(rows: list[Row]) -> list[Row]:
    """A line per horizon and gradient: accuracies over the seeds."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if row["experiment"] == EXPERIMENT:
            key = (row["task"]["horizon"], row["task"]["gradient"])
            found.setdefault(key, []).append(row["result"]["accuracy"])
    return [
        {
            "horizon": horizon, "chunks": math.ceil(horizon / CHUNK), "gradient": gradient, "seeds": len(right),
            "accuracy": sum(right) / len(right), "worst": min(right), "best": max(right), "chance": 1 / SYMBOLS,
        }
        for (horizon, gradient), right in found.items()
    ]  # fmt: skip


def _sequences(count: int, horizon: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[count, horizon]`; the symbol is asked for, and is the one target, at the last token."""
    tokens = torch.randint(SYMBOLS + 1, _VOCABULARY, (count, horizon), generator=generator)
    tokens[:, 0] = torch.randint(1, SYMBOLS + 1, (count,), generator=generator)
    tokens[:, -1] = 0
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1] = tokens[:, 0]
    return tokens, targets


def _right(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    asked = targets != IGNORED
    loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return {"loss": loss, "right": ((outputs.argmax(-1) == targets) & asked).sum()}
