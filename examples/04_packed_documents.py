"""Documents of different lengths in one step: packed as a list, or padded on the right. Both are exact.

    python examples/04_packed_documents.py

A list of sequences is one loss over all of them: each starts from the model's initial state, and the loss is divided by
the number of targets of all together. The same documents padded into one batch, with targets of -100 on the padding,
give the same gradient. A mean per document instead of per token is a matter of weights on `token_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig

LENGTHS, CHUNK = (300, 45, 128, 7), 64


def take_gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector, taken off the model."""
    vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return vector


def difference(got: Tensor, expected: Tensor) -> float:
    error = float((got - expected).norm() / expected.norm())
    assert error < 1e-12, error
    return error


def main() -> None:
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=2, width=32, heads=2)).double()
    documents = [torch.randint(0, 256, (length,)) for length in LENGTHS]

    packed = sg.backward(model, documents, chunk=CHUNK)
    from_packed = take_gradients(model)
    print(f"{len(documents)} documents, {packed.num_targets} targets, loss {float(packed.loss):.4f}")

    # The same from the definition: each document alone, all divided by the same number.
    for document in documents:
        sg.backward(model, document, chunk=CHUNK, normalizer=packed.num_targets)
    print(f"packed, against one by one:           {difference(from_packed, take_gradients(model)):.1e}")

    # Right padding: what a padded position computes reaches no target, so it changes nothing.
    inputs = torch.zeros(len(documents), max(LENGTHS), dtype=torch.int64)
    targets = torch.full_like(inputs, -100)
    for row, document in enumerate(documents):
        inputs[row, : len(document)] = document
        targets[row, : len(document) - 1] = document[1:]
    sg.backward(model, inputs, targets, chunk=CHUNK)
    print(f"packed, against padded on the right:  {difference(from_packed, take_gradients(model)):.1e}")

    # A mean per document, then over documents: short documents count as much as long ones.
    losses = sg.token_loss(model, documents, chunk=CHUNK)
    means = torch.stack([loss.sum() / (loss.shape[1] - 1) for loss in losses])
    means.mean().backward()
    per_document = take_gradients(model)
    print(f"mean over documents {float(means.detach().mean()):.4f}, gradient norm {float(per_document.norm()):.4f}")
    print("packed documents: exact")


if __name__ == "__main__":
    main()
