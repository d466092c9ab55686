"""RWKV-4: its state is a list of five tensors `[batch, width, layers]`, written to in place, layer by layer.

In place of each tensor stands an object with the same two accesses, `x[:, :, layer]` and `x[:, :, layer] = new`, which
reads the state before the chunk and notes the one after it: what is read and what is computed stay the same.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.models.rwkv.modeling_rwkv import RwkvOutput

from slimgrad.hf.cache import TAKEN, LayerKind, LayerState, RecurrentLayer
from slimgrad.hf.step import BaseStep

_SHIFTS, _TENSORS, _LARGEST = 2, 5, 4  # the token shifts come first; the largest exponent so far is the last
_NOTHING = -1e30  # an exponent below all others


class RwkvStep(BaseStep):
    """The base with a list of such objects as its state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache_name, self.output_type = "state", RwkvOutput

    def prepare(self) -> None:
        """Its weights are divided by powers of two in eval mode, and multiplied again in training."""
        cast(Any, self.base)._rescale_layers()

    def kinds(self) -> list[LayerKind]:
        config, weight = self.config, next(self.base.parameters())
        shift = weight.new_zeros(1, config.hidden_size)
        sums = weight.new_zeros(1, config.attention_hidden_size, dtype=torch.promote_types(weight.dtype, torch.float32))
        one = {i: shift.clone() if i < _SHIFTS else sums.clone() for i in range(_TENSORS)}
        one[_LARGEST] += _NOTHING
        return [LayerKind(RecurrentLayer, {}, {"convolution": {}, "recurrence": one})] * config.num_hidden_layers

    def bound(self, state: Any) -> Any:
        return [_Slots(i, state["layers"]) for i in range(_TENSORS)]

    def following(self, cache: Any) -> Any:
        layers: list[LayerState] = cache[0].before
        found = [
            {**layer, "recurrence": {i: slots.after.get(at, layer["recurrence"][i]) for i, slots in enumerate(cache)}}
            for at, layer in enumerate(layers)
        ]
        for slots in cache:
            slots.after = TAKEN
        return found


class _Slots:
    """One of the five tensors."""

    def __init__(self, which: int, before: list[LayerState]) -> None:
        self.which, self.before, self.after = which, before, dict[int, Tensor]()

    def __getitem__(self, index: tuple[slice, slice, int]) -> Tensor:
        return self.before[index[2]]["recurrence"][self.which]

    def __setitem__(self, index: tuple[slice, slice, int], value: Tensor) -> None:
        self.after[index[2]] = value
