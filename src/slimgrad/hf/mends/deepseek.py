"""DeepSeek-V4: cache layers of its own, which compress every few tokens into one entry beside a window.

Between chunks they carry the window's last keys (which are the values too), the tokens of a compression window that is
not full yet, the entries so far, and half of the last full window's features, which the next entry reads as well. All
of it is made anew in each pass and nothing is written in place, so it is the state as it is: entries are rows that pile
up, the rest plain tensors. Where nothing came before, the model leaves the other half out; a gate of minus infinity has
the same weight, zero. The number of entries so far is that of full windows before the chunk.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache

from slimgrad.hf.cache import LayerKind, LayerState, kind_of, no_rows
from slimgrad.hf.step import BaseStep


class DeepseekStep(BaseStep):
    """The base with functional layers in place of these."""

    def kinds_in(self, cache: Any) -> list[LayerKind]:
        found = list[LayerKind]()
        for layer, config in zip(cache.layers, self.config.get_text_config().per_layer_config, strict=True):
            if isinstance(layer, DeepseekV4HCACache):
                found.append(LayerKind(CompressedLayer, {"config": config, "of": type(layer)}, _empty(layer)))
            else:
                found.append(kind_of(layer, self.chunk))
        return found


def _empty(filled: DeepseekV4HCACache) -> LayerState:
    layer, overlaps = cast(Any, filled), isinstance(filled, DeepseekV4CSACache)
    state: LayerState = {"keys": layer.keys[:, :, :0].clone(), "buffers": {}, "compressed": {}, "overlap": {}}
    for name, kv in layer.buffer_kv.items():
        gate = layer.buffer_gate[name]
        state["buffers"][name] = {"kv": kv[:, :0].clone(), "gate": gate[:, :0].clone()}
        state["compressed"][name] = no_rows(layer.compressed_kv[name])
        if overlaps:
            shape = (kv.shape[0], layer.compress_rate, kv.shape[2] // 2)
            state["overlap"][name] = {"kv": kv.new_zeros(shape), "gate": gate.new_full(shape, -torch.inf)}
    return state


class CompressedLayer(DeepseekV4HCACache):
    """A window, and entries that are compressed from tokens.

    Args:
        config: the layer's.
        of: the model's own class, which says how many tokens make one entry.
    """

    _layer_type = None  # transformers would take this class for the model's own in every cache
    before: LayerState
    after: LayerState

    def __init__(self, config: Any, of: type[DeepseekV4HCACache]) -> None:
        super().__init__(config)
        self.compress_rate = of(config).compress_rate

    def bind(self, state: LayerState, position: int) -> None:
        """Read `state`, which is that before token `position`."""
        self.before = state
        self.after = {name: dict(value) if isinstance(value, dict) else value for name, value in state.items()}
        self._position = self.cumulative_length = position
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.before["keys"], key_states], dim=-2)
        self.cumulative_length = self._position + key_states.shape[-2]
        self.after["keys"] = keys[:, :, -self.sliding_window + 1 :]
        return keys, keys

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        before, rate = self.before["buffers"][name], self.compress_rate
        kv, gate = torch.cat([before["kv"], kv], dim=1), torch.cat([before["gate"], gate], dim=1)
        full = kv.shape[1] // rate * rate
        self.after["buffers"][name] = {"kv": kv[:, full:], "gate": gate[:, full:]}
        return kv[:, :full], gate[:, :full], self._position // rate * rate

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        rows, self.after["compressed"][name] = self.before["compressed"][name].append(compressed)
        return rows

    def update_overlap_state(
        self, name: str, chunk_kv: Tensor, chunk_gate: Tensor, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """The first half of the last full window's features before the chunk."""
        before = self.before["overlap"][name]
        self.after["overlap"][name] = {
            "kv": chunk_kv[:, -1, :, :head_dim].clone(),
            "gate": chunk_gate[:, -1, :, :head_dim].clone(),
        }
        return before["kv"], before["gate"]
