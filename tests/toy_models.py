"""Causal models that are not Performers: one for each kind of state, one that mixes them, one fed with signals.

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
        count, counted = state["count"].advance(torch.full((), x.shape[1]))
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


class LinearAttention(nn.Module):
    """Normalised linear attention over prefix sums, with an `advance` of its own and a counter of positions.

    Args:
        doublings: keys grow by this power of two with every token, and the sums with them.
        state_dtype: of the sums; None for that of the parameters.
        halvings: each feature of the keys is smaller by this power of two than the one before it, and that of the
            queries larger, which changes nothing but the sizes of the sums beside each other.
    """

    def __init__(
        self, vocabulary: int = 13, width: int = 4, doublings: float = 0.0, state_dtype: torch.dtype | None = None,
        halvings: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary)
        self.width, self.doublings, self.state_dtype, self.halvings = width, doublings, state_dtype, halvings

    def initial_state(self, batch_size: int) -> dict[str, sg.PrefixSum]:
        zeros = self.head.weight.new_zeros(batch_size, self.width, self.width + 1, dtype=self.state_dtype)
        return {"sums": sg.PrefixSum(zeros), "position": sg.PrefixSum(torch.zeros((), dtype=torch.int64))}

    def advance(self, inputs: Tensor, state: dict[str, sg.PrefixSum]) -> dict[str, sg.PrefixSum]:
        return self._attend(inputs, state)[-1]

    def forward(self, inputs: Tensor, state: dict[str, sg.PrefixSum]) -> tuple[Tensor, dict[str, sg.PrefixSum]]:
        x, q, within, before, following = self._attend(inputs, state)
        sums = before[:, None].to(x.dtype) + within  # [batch, time, features, values and a one]
        numerator, denominator = torch.einsum("btf,btfv->btv", q, sums).split([self.width, 1], -1)
        return self.head(x + numerator / denominator), following

    def _attend(self, inputs: Tensor, state: dict[str, sg.PrefixSum]) -> tuple:
        time = inputs.shape[1]
        before_position, position = state["position"].advance(torch.full((), time))
        x = self.embed(inputs)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.halvings:
            small = torch.exp2(-self.halvings * torch.arange(self.width)).to(x.dtype)
            q, k = q / small, k * small
        if self.doublings:
            gain = torch.exp2((before_position + torch.arange(time)).double() * self.doublings)
            k = k * gain[:, None].to(k.dtype)
        within = (k[..., None] * F.pad(v, (0, 1), value=1.0)[..., None, :]).cumsum(1)
        before, sums = state["sums"].advance(within[:, -1])
        return x, q, within, before, {"sums": sums, "position": position}


class Signals(nn.Module):
    """Floating inputs in a dict, a tuple as state, an untouched constant in it, and tied, frozen, unused parameters."""

    def __init__(self, channels: int = 3, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.read = nn.Linear(channels, width)
        self.again = nn.Linear(channels, width)
        self.again.weight = self.read.weight
        self.decay = nn.Parameter(torch.full((width,), 3.0))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(width, classes)
        self.register_buffer("scale", torch.full((width,), 0.7))

    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        return self.decay.new_zeros(batch_size, self.decay.shape[0]), torch.tanh(self.decay)[None].expand(
            batch_size, -1
        )

    def forward(self, inputs: dict[str, Tensor], state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        (h, constant), outputs = state, []
        x = torch.tanh(self.read(inputs["left"])) * self.scale + torch.sin(self.again(inputs["right"]))
        decay = torch.sigmoid(self.decay)
        for t in range(x.shape[1]):
            h = decay * h + (1 - decay) * x[:, t]
            outputs.append(h * constant)
        return self.head(torch.tanh(self.frozen(torch.stack(outputs, 1)))), (h, constant)


MODELS = {
    "gated": GatedRecurrence,
    "cached": CachedAttention,
    "all kinds": AllKinds,
    "linear attention": LinearAttention,
    "signals": Signals,
}
