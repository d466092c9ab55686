"""The same gradient, chunk by chunk: equal to plain backpropagation, in memory that the length does not move.

    python examples/01_exact_gradient.py

Counts the bytes that autograd keeps for its backward pass, which is what grows with the sequence in plain
backpropagation, and compares the two gradients at each length.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig

CHUNK = 256
LENGTHS = (512, 1024, 2048, 4096)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """The bytes that graphs hold for their backward pass, and the most they held at one time."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self.live = self.peak = 0
        self._counted = {x.untyped_storage().data_ptr() for x in given}  # there anyway: parameters, tokens

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


def take_gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector, taken off the model."""
    vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return vector


def plain(model: Performer, tokens: Tensor) -> None:
    """One graph over the whole sequence."""
    outputs, _ = model(tokens, model.initial_state(1))
    F.cross_entropy(outputs[0, :-1], tokens[0, 1:]).backward()


def main() -> None:
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=2, width=64, heads=2))
    print(f"chunks of {CHUNK} tokens, float32\n")
    print(f"{'tokens':>7}  {'plain: saved':>12}  {'chunked: saved':>14}  {'difference of the gradients':>27}")
    errors, peaks = [], []
    for length in LENGTHS:
        tokens = torch.randint(0, 256, (1, length))
        saved_plain, saved_chunked = (SavedBytes(*model.parameters(), tokens) for _ in range(2))
        with saved_plain:
            plain(model, tokens)
        expected = take_gradients(model)
        with saved_chunked:
            sg.backward(model, tokens, chunk=CHUNK)
        got = take_gradients(model)
        errors.append(float((got - expected).norm() / expected.norm()))
        peaks.append(saved_chunked.peak)
        megabytes = [f"{saved.peak / 1e6:.2f} MB" for saved in (saved_plain, saved_chunked)]
        print(f"{length:>7}  {megabytes[0]:>12}  {megabytes[1]:>14}  {errors[-1]:>27.1e}")
    assert max(errors) < 1e-5
    assert peaks[-1] < 1.01 * peaks[1]
    print("\nsame gradient to rounding; what is saved does not grow with the length")


if __name__ == "__main__":
    main()
