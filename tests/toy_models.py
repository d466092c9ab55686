"""Three causal models that are not Performers: one for each kind of state, and one that mixes all three.

Memory is long on purpose: gates close to one, sums that never forget. A model that forgets fast hides a cut gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg


class GatedRecurrence(nn.Module):
    """h_t = a_t h_{t-1} + (1 - a_t) x_t with gates near 0.99: a plain tensor, which division cannot roll back."""

    def __init__(self, vocabulary: int = 13, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gate = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)
        self.start = nn.Parameter(torch.randn(width) * 0.3)  # the initial state depends on a parameter
        nn.init.constant_(self.gate.bias, 4.0)

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        return {"h": self.start.expand(batch_size, -1), "position": torch.zeros((), dtype=torch.int64)}

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.dropout(self.embed(inputs))
        gate, value = torch.sigmoid(self.gate(x)), torch.tanh(self.value(x))
        h, outputs = state["h"].to(x.dtype), []
        for t in range(x.shape[1]):
            h = gate[:, t] * h + (1 - gate[:, t]) * value[:, t]
            outputs.append(h)
        return self.head(torch.stack(outputs, 1)), {"h": h, "position": state["position"] + x.shape[1]}


class CachedAttention(nn.Module):
    """One softmax attention layer over a growing cache of keys and values, with positions from its length."""

    def __init__(self, vocabulary: int = 13, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary)
        self.width = width

    def initial_state(self, batch_size: int) -> dict[str, sg.Growing]:
        empty = self.head.weight.new_zeros(batch_size, 0, self.width)
        return {"keys": sg.Growing(empty), "values": sg.Growing(empty)}

    def forward(self, inputs: Tensor, state: dict[str, sg.Growing]) -> tuple[Tensor, dict[str, sg.Growing]]:
        start, time = state["keys"].length, inputs.shape[1]
        positions = torch.arange(start, start + time, device=inputs.device)
        x = self.embed(inputs)
        x = x + torch.sin(positions[:, None] / (1 + torch.arange(x.shape[-1], device=x.device))).to(x.dtype)
        q, k, v = self.qkv(x).chunk(3, -1)
        keys, following_keys = state["keys"].append(k)
        values, following_values = state["values"].append(v)
        scores = q @ keys.transpose(1, 2) / self.width**0.5
        causal = torch.arange(start + time, device=x.device)[None] <= positions[:, None]
        mixed = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ values
        return self.head(x + mixed), {"keys": following_keys, "values": following_values}


class AllKinds(nn.Module):
    """A running mean (PrefixSum), a cache (Growing), a convolution's tail (plain tensor) and counters, in layers."""

    def __init__(self, vocabulary: int = 13, width: int = 6, taps: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.conv = nn.Conv1d(width, width, taps)
        self.summed = nn.Linear(width, width)
        self.attention = nn.Linear(width, 3 * width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary)
        self.width, self.taps = width, taps

    def initial_state(self, batch_size: int) -> dict[str, object]:
        zeros = self.head.weight.new_zeros
        return {
            "tail": zeros(batch_size, self.taps - 1, self.width),
            "sums": [sg.PrefixSum(zeros(batch_size, self.width))],
            "count": sg.PrefixSum(torch.zeros((), dtype=torch.int64)),
            "cache": (sg.Growing(zeros(batch_size, 0, 2 * self.width)), None),
            "chunks": 0,
        }

    def forward(self, inputs: Tensor, state: dict[str, object]) -> tuple[Tensor, dict[str, object]]:
        x = self.dropout(self.embed(inputs))
        padded = torch.cat([state["tail"].to(x.dtype), x], 1)
        x = x + torch.tanh(self.conv(padded.transpose(1, 2))).transpose(1, 2)
        y = torch.tanh(self.summed(x))
        before, sums = state["sums"][0].advance(y.sum(1))
        count, counted = state["count"].advance(torch.tensor(x.shape[1]))
        seen = count + torch.arange(1, x.shape[1] + 1)
        x = x + (before[:, None].to(x.dtype) + y.cumsum(1)) / seen[:, None].to(x.dtype)
        q, k, v = self.attention(x).chunk(3, -1)
        rows, cache = state["cache"][0].append(torch.cat([k, v], -1))
        keys, values = rows.to(x.dtype).chunk(2, -1)
        scores = q @ keys.transpose(1, 2) / self.width**0.5
        causal = torch.arange(rows.shape[1])[None] < seen[:, None]
        x = x + scores.masked_fill(~causal, float("-inf")).softmax(-1) @ values
        following = {
            "tail": padded[:, -(self.taps - 1) :],
            "sums": [sums],
            "count": counted,
            "cache": (cache, None),
            "chunks": state["chunks"] + 1,
        }
        return self.head(x), following


MODELS = {"gated": GatedRecurrence, "cached": CachedAttention, "all kinds": AllKinds}
