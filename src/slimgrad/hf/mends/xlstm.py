"""xLSTM: a cache of its own, whose tensors are overwritten (`copy_`) with each pass' states.

In place of each tensor's `copy_` stands one that notes the new state; what the cells are handed is the state before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.xlstm.modeling_xlstm import xLSTMCache

from slimgrad.hf.cache import TAKEN, LayerKind, LayerState, RecurrentLayer
from slimgrad.hf.step import BaseStep


class XlstmStep(BaseStep):
    """The base with such a cache."""

    def new_cache(self) -> Any:
        weight = next(self.base.parameters())
        empty = xLSTMCache(self.config, 1, dtype=weight.dtype, device=str(weight.device))
        layers = [{"recurrence": dict(enumerate(one))} for one in empty.rnn_state.values()]
        return XlstmCache(layers)

    def kinds_in(self, cache: Any) -> list[LayerKind]:
        """In the dtypes that the cells hand out, which `copy_` would have cast."""
        zeros = [{i: torch.zeros_like(x) for i, x in layer["recurrence"].items()} for layer in cache.following()]
        return [LayerKind(RecurrentLayer, {}, {"convolution": {}, "recurrence": one}) for one in zeros]

    def bound(self, state: Any) -> Any:
        return XlstmCache(state["layers"])


class XlstmCache:
    """Reads `before`, and notes what follows."""

    def __init__(self, before: list[LayerState]) -> None:
        self.before, self.rnn_state = before, [_Cell(layer) for layer in before]
        self.seqlen_offset, self.rnn_state_initial = 0, True

    def following(self) -> list[LayerState]:
        """The state after the chunk."""
        found = [
            {**layer, "recurrence": {**layer["recurrence"], **cell.after}}
            for layer, cell in zip(self.before, self.rnn_state, strict=True)
        ]
        for cell in self.rnn_state:
            cell.after = TAKEN
        return found


class _Cell:
    """One layer's tensors."""

    def __init__(self, layer: LayerState) -> None:
        self.before, self.after = layer["recurrence"], dict[int, Tensor]()

    def __len__(self) -> int:
        return len(self.before)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.before.values())

    def __getitem__(self, index: int) -> _Tensor:
        return _Tensor(self, index)


class _Tensor:
    """What is overwritten."""

    def __init__(self, cell: _Cell, index: int) -> None:
        self.cell, self.index = cell, index

    def copy_(self, new: Tensor) -> None:
        self.cell.after[self.index] = new
