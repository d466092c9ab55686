"""Attention to everything before, over bytes: its state is a cache of keys and values, which grows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.states.rows import Growing

_VOCABULARY = 256


class Cached(nn.Module):
    """Softmax attention to all tokens before, whose keys and values are kept: memory is linear in the length."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, _VOCABULARY)

    def initial_state(self, batch_size: int) -> Growing:
        """No rows yet."""
        return Growing(self.head.weight.new_zeros(batch_size, 0, 2 * self.head.in_features))

    def forward(self, inputs: Tensor, state: Growing) -> tuple[Tensor, Growing]:
        """One chunk."""
        x = self.embed(inputs.long())
        q, kv = self.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], -1)
        start = state.length
        rows, following = state.append(kv)
        keys, values = rows.chunk(2, -1)
        seen = torch.ones(x.shape[1], keys.shape[1], dtype=torch.bool, device=x.device).tril(start)
        return self.head(x + F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)), following
