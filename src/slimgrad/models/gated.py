"""A gated recurrence over bytes: its state is a plain tensor, which cannot be rolled back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 32  # steps that are computed together


class Gated(nn.Module):
    """h_t = a_t h_{t-1} + (1 - a_t) v_t with a gate a_t in (0, 1) per channel, computed block by block.

    Within a block, with A_t = log a_1 + ... + log a_t: h_t = exp(A_t) h_0 + sum_{i <= t} exp(A_t - A_i) (1 - a_i) v_i,
    where no exponent is above zero.

    Args:
        width: channels.
        vocabulary: symbols.
        gate_bias: where gates begin, before the sigmoid.
    """

    def __init__(self, width: int = 32, vocabulary: int = 256, gate_bias: float = 4.0) -> None:
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
