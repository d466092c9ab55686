"""The models that the contract is run over: add one here, and every test of the contract runs on it.

A factory returns `(model, inputs, targets)` in float64 and eval mode, the same each time: batch 2, a prime number of
tokens, and a model whose memory is long. Targets of None mean next-token prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from slimgrad.models import Cached, Gated, Windowed
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention, Signals

LENGTH = 131
BATCH = 2
VOCABULARY = 13

Built = tuple[nn.Module, Any, Any]


def tokens(length: int = LENGTH, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Random tokens `[BATCH, length]`."""
    return torch.randint(0, vocabulary, (BATCH, length))


def next_token(model_type: Callable[[], nn.Module], *, length: int = LENGTH) -> Callable[[], Built]:
    """A factory for a language model over `VOCABULARY` tokens."""

    def build() -> Built:
        torch.manual_seed(1)
        return model_type().double().eval(), tokens(length), None

    return build


def signals() -> Built:
    """Floating inputs in a dict; some targets ignored."""
    torch.manual_seed(2)
    inputs = {side: torch.randn(BATCH, LENGTH, 3, dtype=torch.float64) for side in ("left", "right")}
    targets = torch.randint(0, 5, (BATCH, LENGTH))
    targets[0, 11:40] = -100
    return Signals().double().eval(), inputs, targets


def shortened(build: Callable[[], Built], length: int) -> Built:
    """The first tokens alone, with a target for each: of next tokens the last would have none, and not count."""
    model, inputs, targets = build()
    targets = tokens() if targets is None else targets
    return model, tree_map(lambda x: x[:, :length], inputs), targets[:, :length]


CASES: list[tuple[str, Callable[[], Built]]] = [
    ("gated", next_token(GatedRecurrence)),
    ("cached", next_token(CachedAttention)),
    ("all kinds", next_token(AllKinds)),
    ("linear attention", next_token(LinearAttention)),
    ("growing sums", next_token(lambda: LinearAttention(doublings=60 / LENGTH))),
    ("sums of all sizes", next_token(lambda: LinearAttention(halvings=20))),
    ("signals", signals),
    ("gates in blocks", next_token(lambda: Gated(width=6, vocabulary=VOCABULARY))),
    ("window", next_token(lambda: Windowed(width=6, window=17))),
    ("cache", next_token(lambda: Cached(width=6))),
    ("window in a cache", next_token(lambda: Cached(width=6, window=30))),
]
