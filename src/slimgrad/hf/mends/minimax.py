"""MiniMax: lightning attention's states lie in a second list of its own cache class.

The states are sums of key-value products, decayed; the model sets new tensors and writes to none, so the list's entries
are the state as they are. Handed a state, the model takes its own path of one token after another, which is the same
recurrence and slower than its path of blocks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from slimgrad.hf.cache import FunctionalCache, LayerKind, RecurrentLayer, kind_of
from slimgrad.hf.step import BaseStep


class MiniMaxStep(BaseStep):
    """The base with a cache whose second list is read from the state."""

    def new_cache(self) -> Any:
        return MiniMaxCache()

    def kinds_in(self, cache: Any) -> list[LayerKind]:
        lightning: list[Any] = [*cache.linear_cache, *[None] * len(cache.layers)]
        softmax = [*cache.layers, *[None] * len(cache.linear_cache)]
        return [
            _lightning(lightning[i]) if isinstance(lightning[i], Tensor) else kind_of(softmax[i], self.chunk)
            for i in range(len(cache))
        ]

    def bound(self, state: Any) -> Any:
        return FunctionalMiniMaxCache(self.kinds(), state["layers"], state["position"])


def _lightning(x: Tensor) -> LayerKind:
    return LayerKind(RecurrentLayer, {}, {"convolution": {}, "recurrence": {0: torch.zeros_like(x)}})


class FunctionalMiniMaxCache(FunctionalCache, MiniMaxCache):
    """Its second list, read from the state before the chunk and written to the state after it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.linear_cache = []

    def get_linear_cache(self, layer_idx: int) -> Tensor:
        return cast(RecurrentLayer, self.layers[layer_idx]).before["recurrence"][0]

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        cast(RecurrentLayer, self.layers[layer_idx]).after["recurrence"][0] = linear_cache
