"""A model of your own: a gated recurrence that must remember its first symbol over eight chunks.

    python examples/02_your_own_model.py

Two methods make a module a causal model: `initial_state` and `forward(inputs, state) -> (outputs, next_state)`. The
state here is a plain tensor that a gate updates, so nothing can be subtracted from it; slimgrad keeps a copy per chunk.
The task has its answer one whole sequence back. With the state's gradient cut at every chunk (what is often called
truncated backpropagation) the model cannot learn it; with the exact gradient it does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg

SYMBOLS, FILLER, LENGTH, CHUNK, STEPS = 4, 4, 48, 6, 40


class GatedRecurrence(nn.Module):
    """h_t = a_t h_{t-1} + (1 - a_t) v_t, the gates a_t and the values v_t functions of the token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Embedding(SYMBOLS + 1, width)
        self.value = nn.Embedding(SYMBOLS + 1, width)
        self.start = nn.Parameter(torch.zeros(width))  # the initial state may depend on parameters
        self.head = nn.Linear(width, SYMBOLS)
        nn.init.constant_(self.gate.weight, 4.0)  # slow gates: memory is long

    def initial_state(self, batch_size: int) -> Tensor:
        return self.start.expand(batch_size, -1)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gates, values = torch.sigmoid(self.gate(inputs)), torch.tanh(self.value(inputs))
        h, outputs = state, []
        for gate, value in zip(gates.unbind(1), values.unbind(1), strict=True):
            h = gate * h + (1 - gate) * value
            outputs.append(h)
        return self.head(torch.stack(outputs, 1) * 8), h


class Truncated(GatedRecurrence):
    """The same, its gradient cut at every chunk."""

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs, h = super().forward(inputs, state)
        return outputs, h.detach()


def recall_task(batch: int) -> tuple[Tensor, Tensor]:
    """One symbol, then filler; the only target is that symbol, at the last position."""
    inputs = torch.full((batch, LENGTH), FILLER)
    inputs[:, 0] = torch.randint(0, SYMBOLS, (batch,))
    targets = torch.full((batch, LENGTH), -100)
    targets[:, -1] = inputs[:, 0]
    return inputs, targets


def recalled(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The loss, and beside it a metric that adds up over the chunks."""
    counted = targets != -100
    loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return {"loss": loss, "correct": (outputs.argmax(-1) == targets)[counted].sum()}


def train(model: nn.Module) -> float:
    """The share of symbols recalled after training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        sg.backward(model, *recall_task(16), chunk=CHUNK, loss_fn=recalled)
        optimizer.step()
        optimizer.zero_grad()
    result = sg.evaluate(model, *recall_task(256), chunk=CHUNK, loss_fn=recalled)
    return int(result.metrics["correct"]) / result.num_targets


def main() -> None:
    torch.manual_seed(0)
    for kind in (GatedRecurrence, Truncated):
        model = kind()
        report = sg.verify(model, *recall_task(2), chunk=CHUNK, loss_fn=recalled)
        verdict = "exact" if report.passed else f"NOT EXACT (step off by {report.global_errors['step']:.1e})"
        share = train(model)
        print(f"{kind.__name__:>16}: {verdict}; recalls {share:.0%} of the symbols, chance is {1 / SYMBOLS:.0%}")
        assert share > 0.9 if report.passed else share < 0.5


if __name__ == "__main__":
    main()
