"""GPT-NeoX Japanese: calls `view` on the keys it gets from the cache, which rows along time are not laid out for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimgrad.hf.cache import FunctionalCache
from slimgrad.hf.step import BaseStep


class ContiguousStep(BaseStep):
    """The base with its keys and values copied into the layout that its code expects: the same numbers."""

    def bound(self, state: Any) -> Any:
        return ContiguousCache(self.kinds(), state["layers"], state["position"])


class ContiguousCache(FunctionalCache):
    """What it hands out lies as transformers' own cache lays it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys.contiguous(), values.contiguous()
