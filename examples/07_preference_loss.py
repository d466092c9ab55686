"""A loss that no chunk can compute: a preference between two sequences (DPO), against plain backpropagation.

    python examples/07_preference_loss.py

The loss compares the log-probabilities of two whole sequences under the model and under a frozen copy of it. It is
written as in any PyTorch program: `sg.token_loss` gives every token's loss, here the negative log-probability of the
next token, and its backward pass is the reverse sweep, over one sequence and then over the other.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig

CHUNK, LENGTH, BETA = 128, 2048, 0.1
LogProbability = Callable[[nn.Module, Tensor], Tensor]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes that graphs held for their backward pass at one time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self.live = self.peak = 0
        self._counted = {p.untyped_storage().data_ptr() for p in model.parameters()}  # there anyway

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._counted:
            self._counted.add(address)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, address, storage.nbytes())
        return tensor.detach()

    def _freed(self, address: int, nbytes: int) -> None:
        self._counted.discard(address)
        self.live -= nbytes


def chunked(model: nn.Module, tokens: Tensor) -> Tensor:
    """The log-probability of each sequence, `[batch]`, chunk by chunk. Under `no_grad` it keeps nothing at all."""
    return -sg.token_loss(model, tokens, chunk=CHUNK).sum(1)


def plain(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same in one graph."""
    outputs, _ = model(tokens, model.initial_state(len(tokens)))
    return -F.cross_entropy(outputs[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)


def preference_loss(
    log_probability: LogProbability, model: nn.Module, reference: nn.Module, chosen: Tensor, rejected: Tensor
) -> Tensor:
    """DPO: how much more the model prefers `chosen` than the reference does."""
    with torch.no_grad():
        before = log_probability(reference, chosen) - log_probability(reference, rejected)
    margin = log_probability(model, chosen) - log_probability(model, rejected) - before
    return -F.logsigmoid(BETA * margin).mean()


def main() -> None:
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=2, width=32, heads=2)).double()
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        model.head.weight.mul_(1.5)  # as if it had been trained a little
    chosen, rejected = torch.randint(0, 256, (1, LENGTH)), torch.randint(0, 256, (1, LENGTH + 100))

    losses, gradients, peaks = [], [], []
    for log_probability in (plain, chunked):
        saved = SavedBytes(model)
        with saved:
            loss = preference_loss(log_probability, model, reference, chosen, rejected)
            loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        peaks.append(saved.peak)
        model.zero_grad()

    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    print(f"sequences of {LENGTH} and {LENGTH + 100} tokens, chunks of {CHUNK}, float64")
    print(f"loss: plain {losses[0]:.6f}, chunked {losses[1]:.6f}")
    print(f"saved for the backward pass: plain {peaks[0] / 1e6:.1f} MB, chunked {peaks[1] / 1e6:.1f} MB")
    print(f"preference between two sequences: gradients differ by {error:.1e}")
    assert error < 1e-11
    assert peaks[1] < peaks[0] / 10


if __name__ == "__main__":
    main()
