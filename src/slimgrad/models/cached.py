"""Attention to everything before, or to a wide window, over bytes: its state is a growing cache of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.states.rows import Growing

_VOCABULARY = 256


class Cached(nn.Module):
    """Softmax attention to all tokens before, whose keys and values are kept: memory is linear in the length.

    Args:
        width: of the hidden states.
        window: tokens that each one sees, itself included; None: all before.
    """

    def __init__(self, width: int = 32, window: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, _VOCABULARY)
        self.window = window

    def initial_state(self, batch_size: int) -> Growing:
        """No rows yet."""
        return Growing(self.head.weight.new_zeros(batch_size, 0, 2 * self.head.in_features))

    def forward(self, inputs: Tensor, state: Growing) -> tuple[Tensor, Growing]:
        """One chunk."""
        x = self.embed(inputs.long())
        q, kv = self.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], -1)
        rows, following = state.append(kv, last=None if self.window is None else self.window - 1 + x.shape[1])
        keys, values = rows.chunk(2, -1)
        before = keys.shape[1] - x.shape[1]
        seen = torch.ones(x.shape[1], keys.shape[1], dtype=torch.bool, device=x.device).tril(before)
        if self.window is not None:
            seen = seen.triu(before - self.window + 1)
        return self.head(x + F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)), following
