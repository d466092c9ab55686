"""Small models of each kind of state: the paper's sums, gates, a sliding window, a cache of keys and values.

The last three are what the paper's models do not have: a plain tensor that cannot be rolled back, one that holds the
last few rows, and one that grows. Each is a language model over bytes of one layer, with
`initial_state(batch)` and `forward(tokens, state)`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.models import Performer, PerformerConfig
from slimgrad.states.rows import Growing

VOCABULARY = 256
_BLOCK = 32  # steps of a gated recurrence that are computed together


class Gated(nn.Module):
    """h_t = a_t h_{t-1} + (1 - a_t) v_t with a gate a_t in (0, 1) per channel, computed block by block.

    Within a block, with A_t = log a_1 + ... + log a_t: h_t = exp(A_t) h_0 + sum_{i <= t} exp(A_t - A_i) (1 - a_i) v_i,
    where no exponent is above zero.

    Args:
        width: channels.
        vocabulary: symbols.
        gate_bias: where gates begin, before the sigmoid.
    """

    def __init__(self, width: int = 32, vocabulary: int = VOCABULARY, gate_bias: float = 4.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gate = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)
        nn.init.constant_(self.gate.bias, gate_bias)

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros `[batch, width]`."""
        return self.head.weight.new_zeros(batch_size, self.head.in_features)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk."""
        x = self.embed(inputs.long())
        logits, values = self.gate(x), self.value(x)
        logs, written = F.logsigmoid(logits), torch.sigmoid(-logits) * values
        outputs: list[Tensor] = []
        for log, write in zip(logs.split(_BLOCK, 1), written.split(_BLOCK, 1), strict=True):
            sums = log.cumsum(1)
            gaps = sums[:, :, None] - sums[:, None]  # [batch, to, from, width]
            later = torch.ones(gaps.shape[1:3], dtype=torch.bool, device=gaps.device).triu(1)[..., None]
            kept = torch.einsum("btiw,biw->btw", gaps.masked_fill(later, -torch.inf).exp(), write)
            block = kept + sums.exp() * state[:, None]
            outputs.append(block)
            state = block[:, -1]
        return self.head(x + torch.cat(outputs, 1)), state


class Windowed(nn.Module):
    """Softmax attention to the last `window` tokens, whose keys and values are the state: a plain tensor."""

    def __init__(self, width: int = 32, window: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, VOCABULARY)
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


class Cached(nn.Module):
    """Softmax attention to all tokens before, whose keys and values are kept: memory is linear in the length."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, VOCABULARY)

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


def build(kind: str) -> nn.Module:
    """A fresh model of that kind, the same each time."""
    makers: dict[str, Any] = {
        "sums": lambda: Performer(PerformerConfig(layers=1, width=32, heads=1)),
        "gates": Gated,
        "window": Windowed,
        "cache": Cached,
    }
    torch.manual_seed(0)
    return makers[kind]()


KINDS = ("sums", "gates", "window", "cache")
