"""Text from a trained model, byte by byte from the recurrent state: memory and time per byte do not grow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slimgrad.errors import InputError
from slimgrad.models.performer import Performer


def generate(model: Performer, prompt: bytes, num_bytes: int, *, temperature: float = 0.0, seed: int = 0) -> bytes:
    """Continue a prompt.

    Args:
        model: over bytes.
        prompt: at least one byte.
        num_bytes: how many follow it.
        temperature: logits are divided by it before a byte is drawn; 0 takes the likeliest byte.
        seed: decides what is drawn.

    Returns:
        The bytes that follow the prompt.
    """
    if not prompt:
        raise InputError("prompt: expected at least one byte to go on from, got none")
    if temperature < 0:
        raise InputError(f"temperature={temperature}: expected zero or more")
    return bytes(_draw(model, prompt, num_bytes, temperature, torch.Generator().manual_seed(seed)))


@torch.no_grad()
def _draw(
    model: Performer, prompt: bytes, num_bytes: int, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    device = model.head.weight.device
    tokens = torch.frombuffer(bytearray(prompt), dtype=torch.uint8)[None].to(device)
    state = model.initial_state(1)
    for _ in range(num_bytes):
        logits, state = model(tokens, state)
        chosen = _choose(logits[0, -1], temperature, generator)
        yield chosen
        tokens = torch.tensor([[chosen]], dtype=torch.uint8, device=device)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
