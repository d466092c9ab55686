"""Attention within a sliding window, over bytes: its state holds the last few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_VOCABULARY = 256


class Windowed(nn.Module):
    """Softmax attention to the last `window` tokens, whose keys and values are the state: a plain tensor."""

    def __init__(self, width: int = 32, window: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, _VOCABULARY)
        self.window = window

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """No rows yet: zeros `[batch, window, 2 width]`, and how many tokens came before."""
        rows = self.head.weight.new_zeros(batch_size, self.window, 2 * self.head.in_features)
        return {"rows": rows, "position": torch.zeros((), dtype=torch.int64, device=rows.device)}

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One chunk, attended to in blocks of a window's length."""
        x = self.embed(inputs.long())
        q, kv = self.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], -1)
        rows = torch.cat([state["rows"], kv], 1)
        outputs: list[Tensor] = []
        for begin in range(0, x.shape[1], self.window):
            queries = q[:, begin : begin + self.window]
            keys, values = rows[:, begin : begin + self.window + queries.shape[1]].chunk(2, -1)
            to = torch.arange(queries.shape[1], device=x.device)[:, None]
            at = torch.arange(keys.shape[1], device=x.device)[None] - self.window
            seen = (at <= to) & (at > to - self.window) & (at + begin + state["position"] >= 0)
            outputs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen))
        following = {"rows": rows[:, -self.window :], "position": state["position"] + x.shape[1]}
        return self.head(x + torch.cat(outputs, 1)), following
