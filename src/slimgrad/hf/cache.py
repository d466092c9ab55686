"""transformers' cache as the state of a causal step: layers read what was before the chunk and rebind what follows.

transformers keeps one list of layer objects per cache, one class per kind of state. Each has a functional subclass
here, so that `isinstance` checks in model code hold: `update` reads only `before` and writes only `after`, and a layer
may run twice (activation checkpointing inside a chunk). Nothing is copied in place, since autograd needs the old value.

| layer of transformers | state |
|---|---|
| full attention | `Growing` rows of keys and values |
| a window narrower than a chunk | its last rows, plain tensors |
| a window as wide as a chunk, or wider | `Growing`, of which the chunk sees the last rows |
| convolution, recurrence | plain tensors |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import cache_utils as hf

from slimgrad.errors import ModelError
from slimgrad.states.rows import Growing

LayerState = dict[str, Any]


class LayerKind(NamedTuple):
    """One layer of a model's cache: which functional class, built how, and its state for a batch of one.

    Attributes:
        make: the functional layer's class.
        options: what its constructor takes.
        empty: its state before the first token, batch 1 (rows: none; recurrent states: zeros).
    """

    make: type[Any]
    options: dict[str, Any]
    empty: LayerState

    def bind(self, state: LayerState, position: int) -> Any:
        """The layer, reading `state`, which is that before token `position`."""
        layer = self.make(**self.options)
        layer.bind(state, position)
        return layer

    def names(self) -> list[str]:
        """The kinds of its states, in words."""
        found = [name for name in ("convolution", "recurrence", "indexer", "compressed") if self.empty.get(name)]
        if "keys" in self.empty:
            is_window = issubclass(self.make, hf.DynamicSlidingWindowLayer)
            found.append("window" if is_window else "keys and values")
        return found


class RowsLayer(hf.DynamicLayer):
    """Full attention: all keys and values so far, as rows `[batch, time, heads, dim]`."""

    before: LayerState
    after: LayerState
    position: int
    time: int
    window: int | None = None  # rows that a token sees, its own included; None: all

    def bind(self, state: LayerState, position: int) -> None:
        """Read `state`, which is that before token `position`."""
        self.before, self.after = state, dict(state)
        self.position, self.time, self.is_initialized = position, 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.time = key_states.shape[2]
        last = None if self.window is None else self.window - 1 + self.time
        keys, self.after["keys"] = self.before["keys"].append(key_states.transpose(1, 2), last=last)
        values, self.after["values"] = self.before["values"].append(value_states.transpose(1, 2), last=last)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.position + self.time

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self.position if self.window is None else min(self.position, self.window - 1)
        return seen + query_length, self.position - seen


class IndexedLayer(RowsLayer, hf.DynamicIndexedLayer):
    """Sparse attention with an indexer, whose keys are rows as well."""

    is_indexer_initialized = True

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        with torch.enable_grad():  # indexers choose without gradients; rows are appended with them, whoever asks
            rows, self.after["indexer"] = self.before["indexer"].append(indexer_key_states)
        return rows


class WideWindowLayer(RowsLayer, hf.DynamicSlidingWindowLayer):
    """A window as wide as a chunk, or wider: rows, of which each chunk reads the last."""

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window=sliding_window, **kwargs)
        self.window = sliding_window

    @property
    def cumulative_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tokens so far."""
        return self.position

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None: ...  # transformers' constructor sets it to zero


class WindowLayer(hf.DynamicSlidingWindowLayer):
    """A window narrower than a chunk: its last rows, `[batch, heads, time, dim]`."""

    before: LayerState
    after: LayerState

    def bind(self, state: LayerState, position: int) -> None:
        """Read `state`, which is that before token `position`."""
        self.before, self.after = state, dict(state)
        self.cumulative_length, self.is_initialized = position, True
        self._position = position
        self.dtype, self.device = state["keys"].dtype, state["keys"].device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.cumulative_length = self.before["keys"], self.before["values"], self._position
        # by name, since hybrid layers, which are no WindowLayer, update so too
        found = hf.DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        self.after["keys"], self.after["values"] = self.keys, self.values
        self.keys = self.values = None
        return found


class RecurrentLayer(hf.LinearAttentionLayer):
    """A convolution's last inputs and a recurrence's state, each possibly several."""

    before: LayerState
    after: LayerState

    def bind(self, state: LayerState, position: int) -> None:
        """Read `state`, which is that before token `position`."""
        self.before = state
        self.after = {**state, "convolution": dict(state["convolution"]), "recurrence": dict(state["recurrence"])}
        for index, x in state["convolution"].items():
            self.conv_states[index], self.conv_kernel_size[index] = x, x.shape[-1]
            self.is_conv_states_initialized[index] = self.has_previous_state[index] = True
        for index, x in state["recurrence"].items():
            self.recurrent_states[index] = x
            self.is_recurrent_states_initialized[index] = self.has_previous_state[index] = True

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        before = self.before["convolution"][state_idx]
        seen = torch.cat([before, conv_states], dim=-1)
        self.after["convolution"][state_idx] = seen[..., -before.shape[-1] :]
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.after["recurrence"][state_idx] = recurrent_states
        return recurrent_states


class _Hybrid:
    """A layer with both a recurrence and attention: each kind binds and updates its own part of one state."""

    attention: type[Any]
    after: LayerState

    def bind(self, state: LayerState, position: int) -> None:
        """Read `state`, which is that before token `position`."""
        self.attention.bind(self, state, position)
        RecurrentLayer.bind(cast(RecurrentLayer, self), state, position)

    update_conv_state = RecurrentLayer.update_conv_state
    update_recurrent_state = RecurrentLayer.update_recurrent_state


class HybridLayer(_Hybrid, hf.LinearAttentionAndFullAttentionLayer):
    """A recurrence beside full attention."""

    attention, window = RowsLayer, None
    update, get_seq_length, get_mask_sizes = RowsLayer.update, RowsLayer.get_seq_length, RowsLayer.get_mask_sizes


class HybridWindowLayer(_Hybrid, hf.LinearAttentionAndSlidingWindowAttentionLayer):
    """A recurrence beside a window."""

    attention, update = WindowLayer, WindowLayer.update


class UnusedLayer(hf.DynamicLayer):
    """A layer that stored nothing when it was probed (it reads another layer's keys)."""

    after: LayerState

    def bind(self, state: LayerState, position: int) -> None:
        """Nothing to read."""
        self.after = state

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ModelError(
            "a cache layer that stored nothing for the first tokens stored something later; expected a state whose "
            "structure does not change along the sequence"
        )


class NoLayer(hf.DummyLayer):
    """transformers' placeholder for layers without a state."""

    after: LayerState

    def bind(self, state: LayerState, position: int) -> None:
        """Nothing to read."""
        self.after = state


class Taken(dict[Any, Any]):
    """Where a layer writes that runs again after its state was taken: nowhere."""

    def __getitem__(self, key: Any) -> Taken:
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...


TAKEN = Taken()


class FunctionalCache(hf.DynamicCache):
    """The cache that a model is handed for one chunk.

    Args:
        kinds: of its layers.
        state: that before the chunk.
        position: tokens before the chunk.
    """

    def __init__(self, kinds: list[LayerKind], state: list[LayerState], position: int) -> None:
        layers = [kind.bind(one, position) for kind, one in zip(kinds, state, strict=True)]
        hf.Cache.__init__(self, layers=layers)
        self._position = position

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk, whichever layer is asked: those without attention count none."""
        return self._position

    def following(self) -> list[LayerState]:
        """The state after the chunk, which the cache itself lets go: a checkpointed layer, and so the chunk's graph,
        holds the cache, and would hold itself for good.
        """
        layers = cast("list[Any]", self.layers)
        found = [layer.after for layer in layers]
        for layer in layers:
            layer.after = TAKEN
        return found


def kinds_of(cache: hf.Cache, chunk: int) -> list[LayerKind]:
    """What a model's own cache holds, after it was filled with a few tokens of a batch of one.

    Args:
        cache: filled by the model.
        chunk: tokens per chunk, which decides how a window is carried.

    Raises:
        ModelError: a layer of a kind that is not known here.
    """
    return [kind_of(layer, chunk) for layer in cast("list[Any]", cache.layers)]


def kind_of(layer: Any, chunk: int) -> LayerKind:
    """The same for one layer."""
    kind = type(layer)
    options = {} if getattr(layer, "number_of_states", None) is None else {"number_of_states": layer.number_of_states}
    if kind is hf.DummyLayer:
        return LayerKind(NoLayer, {}, {})
    if kind is hf.LinearAttentionLayer:
        return LayerKind(RecurrentLayer, options, _recurrent(layer))
    if kind is hf.LinearAttentionAndFullAttentionLayer:
        return LayerKind(HybridLayer, options, {**_rows(layer), **_recurrent(layer)})
    if kind is hf.LinearAttentionAndSlidingWindowAttentionLayer:
        options["sliding_window"] = layer.sliding_window
        return LayerKind(HybridWindowLayer, options, {**_window(layer), **_recurrent(layer)})
    if layer.keys is None and kind in (hf.DynamicLayer, hf.DynamicSlidingWindowLayer, hf.DynamicIndexedLayer):
        return LayerKind(UnusedLayer, {}, {})
    if kind is hf.DynamicSlidingWindowLayer:
        options["sliding_window"] = layer.sliding_window
        if layer.sliding_window < chunk:
            return LayerKind(WindowLayer, options, _window(layer))
        return LayerKind(WideWindowLayer, options, _rows(layer))
    if kind is hf.DynamicIndexedLayer:
        return LayerKind(IndexedLayer, options, {**_rows(layer), **_indexer(layer)})
    if kind is hf.DynamicLayer:
        return LayerKind(RowsLayer, options, _rows(layer))
    raise ModelError(
        f"the model keeps its state in a cache layer of a kind that is not known: {kind.__name__}. Expected "
        "transformers' own layers (full or sliding attention, convolution, recurrence); see docs/huggingface.md"
    )


def _rows(layer: Any) -> LayerState:
    return {name: no_rows(x.transpose(1, 2)) for name, x in (("keys", layer.keys), ("values", layer.values))}


def _indexer(layer: Any) -> LayerState:
    return {} if layer.indexer_keys is None else {"indexer": no_rows(layer.indexer_keys)}


def _window(layer: Any) -> LayerState:
    return {"keys": layer.keys[:, :, :0].clone(), "values": layer.values[:, :, :0].clone()}


def _recurrent(layer: Any) -> LayerState:
    def zeros(states: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
        return {index: torch.zeros_like(x) for index, x in states.items() if x is not None}

    return {"convolution": zeros(layer.conv_states), "recurrence": zeros(layer.recurrent_states)}


def no_rows(x: Tensor) -> Growing:
    """Rows `[batch, time, ...]` like those of `x`, none of them yet."""
    return Growing(x.new_zeros(x.shape[0], 0, *x.shape[2:]))
