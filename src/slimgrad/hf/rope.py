"""Rotary embeddings whose frequencies depend on the length: chosen once, for the whole sequence.

"dynamic" and "longrope" choose frequencies by the length that a forward pass sees, which in chunks would be the length
so far. They are asked once for the whole length, and what they answer is used in every chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

_BY_LENGTH = ("dynamic", "longrope")
_WATCHED = ("attention_scaling",)  # what they set beside their frequencies


def depends_on_length(base: nn.Module) -> bool:
    """Whether a module of `base` chooses its frequencies by the length."""
    return any(_kinds(module) for module in base.modules())


def _kinds(module: nn.Module) -> list[str | None]:
    """The layer types of a rotary module whose frequencies depend on the length; None for a module with one type."""
    kind = cast(Any, getattr(module, "rope_type", None))
    by_layer: dict[str | None, Any] = kind if isinstance(kind, dict) else {None: kind}
    return [layer for layer, name in by_layer.items() if isinstance(name, str) and name in _BY_LENGTH]


@contextmanager
def fixed_frequencies(base: nn.Module, total: int) -> Generator[None]:
    """Within the block every rotary module uses the frequencies of a sequence of `total` tokens."""
    put_back: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    try:
        for module in base.modules():
            layers = _kinds(module)
            if not layers:
                continue
            asked = _asked(module, layers, total)
            buffers = dict(module._buffers)  # pyright: ignore[reportPrivateUsage]
            put_back.append((module, buffers, {name: module.__dict__.get(name) for name in (*_WATCHED, "rope_type")}))
            for name in buffers:
                module._buffers[name] = asked._buffers[name]  # pyright: ignore[reportPrivateUsage]
            for name in _WATCHED:
                if name in asked.__dict__:
                    module.__dict__[name] = asked.__dict__[name]
            kind = cast(Any, module).rope_type
            module.__dict__["rope_type"] = (
                {k: "default" if k in layers else v for k, v in kind.items()} if isinstance(kind, dict) else "default"
            )
        yield
    finally:
        for module, buffers, values in put_back:
            module._buffers.update(buffers)  # pyright: ignore[reportPrivateUsage]
            module.__dict__.update(values)


def _asked(module: nn.Module, layers: list[str | None], total: int) -> nn.Module:
    """A copy of the rotary module that has seen the last position of a sequence of `total` tokens."""
    fresh = copy.deepcopy(module)
    buffer = next(iter(fresh.buffers()))
    x, last = buffer.new_zeros(1, 1, 1), torch.full((1, 1), total - 1, device=buffer.device)
    with torch.no_grad():
        for layer in layers:
            fresh(x, last) if layer is None else fresh(x, last, layer)
    return fresh
