"""The Performer of the paper, and a modern one, from one configuration.

A layer is `mix` (causal linear attention over prefix sums) and a feed-forward block. Rows mix only through the sums, so
a chunk needs the sums before it and nothing else of the past: the state is one `PrefixSum` per sum and layer, and it
rolls back bit for bit.

| | paper | modern |
|---|---|---|
| norm | layer norm on each sub-layer's output, or before it | RMS norm before each sub-layer and before the head |
| embedding | of the token | of the last few tokens, each from a table of its own |
| attention | divided by its weights' sum | each head's output divided by its root mean square |
| after the heads | nothing | a linear map |

Source: "Sub-Linear Memory: How to Make Performers SLiM" (NeurIPS 2021), section 2 and appendix; what the modern
one is made of was measured: docs/decisions/modern-preset.md. Cost per token and layer: 22 d^2 FLOPs forward
as published (d_ff = 4 d), beside attention. State: `layers * width * (features + 1)` numbers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.models.shapes import PerformerConfig
from slimgrad.ops.feature_maps import draw_projection, get_feature_map
from slimgrad.ops.linear_attention import get_form
from slimgrad.states.sums import PrefixSum

Tokens = Int[Tensor, "batch time"]
Hidden = Float[Tensor, "batch time width"]
Logits = Float[Tensor, "batch time vocabulary"]
State = dict[str, Any]

_BASE = 10_000.0


def _norm(config: PerformerConfig) -> nn.Module:
    return nn.RMSNorm(config.width) if config.norm == "rms" else nn.LayerNorm(config.width)


class PerformerLayer(nn.Module):
    """Attention and feed-forward, with their norms and residual connections.

    Queries have a matrix of their own and keys and values share one, so that `advance` computes just the latter.
    """

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.config = config
        self.form = get_form(config.form)
        self.feature_map = get_feature_map(config.feature_map)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.project = nn.Linear(config.width, config.width) if config.output_projection else nn.Identity()
        self.attention_norm, self.feedforward_norm = _norm(config), _norm(config)
        self.expand = nn.Linear(config.width, config.feedforward_width)
        self.contract = nn.Linear(config.feedforward_width, config.width)

    def forward(self, x: Hidden, sums: Any, projection: Tensor | None) -> tuple[Hidden, Any]:
        """One chunk through the layer: (outputs, sums after the chunk)."""
        entry = self._enter(x, self.attention_norm)
        parts = self._parts(entry, projection)
        before, following = _advance(sums, parts.total)
        queries = self._features(self._heads(self.query(entry)), projection)
        mixed = self.form.attend(queries, parts, before)
        if not self.config.normalize:
            mixed = functional.rms_norm(mixed, mixed.shape[-1:])
        mixed = mixed.flatten(2)
        x = x + self._leave(self.project(mixed), self.attention_norm)
        fed = self.contract(functional.gelu(self.expand(self._enter(x, self.feedforward_norm))))
        return x + self._leave(fed, self.feedforward_norm), following

    def advance(self, x: Hidden, sums: Any, projection: Tensor | None) -> Any:
        """The sums after the chunk, and nothing else."""
        return _advance(sums, self._parts(self._enter(x, self.attention_norm), projection).total)[1]

    def _parts(self, x: Hidden, projection: Tensor | None) -> Any:
        keys, values = self.key_value(x).chunk(2, dim=-1)
        features = self._features(self._heads(keys), projection)
        return self.form.block_sums(features, self._heads(values), normalize=self.config.normalize)

    def _heads(self, x: Hidden) -> Tensor:
        return x.unflatten(-1, (self.config.heads, self.config.head_width))

    def _features(self, x: Tensor, projection: Tensor | None) -> Tensor:
        if self.feature_map.needs_projection:
            x = x * self.config.head_width**-0.25  # on queries and keys alike: the usual 1 / sqrt(d) of their product
        return self.feature_map(x, projection)

    def _enter(self, x: Hidden, norm: nn.Module) -> Hidden:
        return x if self.config.norm == "output" else norm(x)

    def _leave(self, x: Hidden, norm: nn.Module) -> Hidden:
        return norm(x) if self.config.norm == "output" else x


class Performer(nn.Module):
    """A causal language model over prefix sums.

    `forward(tokens, state)`: tokens `[batch, time]` of any integer dtype -> logits `[batch, time, vocabulary]`, state.
    """

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width // 2  # the other half holds the position
        self.embed = nn.Embedding(config.vocabulary, width)
        self.earlier = nn.ModuleList(nn.Embedding(config.vocabulary, width) for _ in range(config.taps - 1))
        self.layers = nn.ModuleList(PerformerLayer(config) for _ in range(config.layers))
        self.final_norm = _norm(config) if config.norm == "rms" else nn.Identity()
        self.head = nn.Linear(config.width, config.vocabulary)

    def initial_state(self, batch_size: int) -> State:
        """Sums of zero, position zero, and a fresh projection for random features."""
        config, like = self.config, self.head.weight
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        shape = (batch_size, config.heads, config.num_features)

        def zeros(*size: int) -> PrefixSum:
            return PrefixSum(torch.zeros(size, dtype=dtype, device=like.device))

        state: State = {
            "layers": [
                (zeros(*shape, config.head_width), zeros(*shape) if config.normalize else None) for _ in self.layers
            ],
            "position": PrefixSum(torch.zeros((), dtype=torch.int64, device=like.device)),
        }
        if get_feature_map(config.feature_map).needs_projection:
            state["projection"] = draw_projection(
                config.heads, config.head_width, config.num_features, dtype=like.dtype, device=like.device
            )
        if config.taps > 1:  # tokens before the sequence: none, which is a symbol that embeds to zero
            state["recent"] = torch.full((batch_size, config.taps - 1), -1, dtype=torch.int64, device=like.device)
        return state

    def forward(self, inputs: Tokens, state: State) -> tuple[Logits, State]:
        """One chunk."""
        x, following = self._begin(inputs, state)
        projection = _constant(state.get("projection"))
        layers: list[Any] = []
        for layer, sums in zip(self.layers, state["layers"], strict=True):
            x, after = layer(x, sums, projection)
            layers.append(after)
        following["layers"] = layers
        return self.head(self.final_norm(x)), following

    def advance(self, inputs: Tokens, state: State) -> State:
        """The state after a chunk: of the last layer, only what its sums need."""
        x, following = self._begin(inputs, state)
        projection = _constant(state.get("projection"))
        layers: list[Any] = []
        *lower, last = zip(self.layers, state["layers"], strict=True)
        for layer, sums in lower:
            x, after = layer(x, sums, projection)
            layers.append(after)
        layer, sums = last
        following["layers"] = [*layers, cast(PerformerLayer, layer).advance(x, sums, projection)]
        return following

    def _begin(self, inputs: Tokens, state: State) -> tuple[Hidden, State]:
        """Embeddings with positions, and the state that follows, except for the layers."""
        tokens, time = inputs.long(), inputs.shape[1]
        following = dict(state)
        # filled there: torch.tensor would be copied to the device, and the chunk wait for it
        start, following["position"] = state["position"].advance(torch.full((), time, device=tokens.device))
        positions = start + torch.arange(time, device=tokens.device)
        if self.config.taps > 1:
            joined = torch.cat([state["recent"], tokens], dim=1)
            following["recent"] = joined[:, time:]
            x = self._embed_with_earlier(joined, time)
        else:
            x = self.embed(tokens)
        sinusoids = _sinusoids(positions, self.config.width // 4, x.dtype)
        return torch.cat([x, sinusoids.expand(x.shape[0], -1, -1)], dim=-1), following

    def _embed_with_earlier(self, joined: Tensor, time: int) -> Hidden:
        """Each token's embedding plus those of the tokens just before it, each distance with its own table."""
        x = self.embed(joined[:, -time:])
        for distance, table in enumerate(self.earlier, start=1):
            tokens = joined[:, self.config.taps - 1 - distance :][:, :time]
            x = x + table(tokens.clamp_min(0)) * (tokens >= 0)[..., None]
        return x


def _advance(sums: tuple[PrefixSum, PrefixSum | None], total: Any) -> tuple[Any, Any]:
    """Both sums of a layer moved on: (their values before, the sums after)."""
    moved = [(None, None) if s is None else s.advance(t) for s, t in zip(sums, total, strict=True)]
    return tuple(before for before, _ in moved), tuple(after for _, after in moved)


def _constant(projection: Tensor | None) -> Tensor | None:
    """Random features take no gradient, though they ride along as state."""
    return None if projection is None else projection.detach()


def _sinusoids(positions: Int[Tensor, " time"], count: int, dtype: torch.dtype) -> Float[Tensor, "time waves"]:
    """Sines, then cosines, `[time, 2 * count]`, of positions at `count` frequencies from 1 down to 1/10000.

    In float64, since float32 angles are off by 0.06 at position 1,000,000 (float32 on devices without float64).
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    frequencies = _BASE ** (-torch.arange(count, device=positions.device, dtype=wide) / count)
    angles = positions[:, None].to(wide) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
