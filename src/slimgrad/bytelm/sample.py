"""Text from a trained model, byte by byte from the recurrent state: memory and time per byte do not grow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slimgrad.errors import InputError, NonFiniteError
from slimgrad.models.performer import Performer

_PREFILL_BYTES = 4096


def generate(
    model: Performer, prompt: bytes, num_bytes: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> bytes:
    """Continue a prompt.

    Args:
        model: over bytes.
        prompt: at least one byte.
        num_bytes: how many follow it.
        temperature: logits are divided by it before a byte is drawn; 0 takes the likeliest byte.
        top_p: a byte is drawn from the fewest likeliest ones that together have this probability.
        seed: decides what is drawn.

    Returns:
        The bytes that follow the prompt.

    Raises:
        InputError: an argument does not fit.
        NonFiniteError: the model diverged.
    """
    return bytes(stream(model, prompt, num_bytes, temperature=temperature, top_p=top_p, seed=seed))


def stream(
    model: Performer, prompt: bytes, num_bytes: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Iterator[int]:
    """As `generate`, each byte as soon as it is drawn.

    Raises:
        InputError: an argument does not fit. At once, not when the first byte is asked for.
    """
    if not prompt:
        raise InputError("prompt: expected at least one byte to go on from, got none")
    if num_bytes < 0:
        raise InputError(f"num_bytes={num_bytes}: expected zero or more")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature={temperature}: expected zero or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: expected more than 0, and at most 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed}: expected between 0 and 2**63 - 1")
    generator = torch.Generator().manual_seed(seed)
    return _draw(model, prompt, num_bytes, temperature, top_p, generator)


@torch.no_grad()
def _draw(
    model: Performer, prompt: bytes, num_bytes: int, temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[int]:
    device = model.head.weight.device
    whole = torch.frombuffer(bytearray(prompt), dtype=torch.uint8)[None]
    state = model.initial_state(1)
    *earlier, tokens = (piece.to(device) for piece in whole.split(_PREFILL_BYTES, dim=1))
    for piece in earlier:
        _, state = model(piece, state)
    for _ in range(num_bytes):
        logits, state = model(tokens, state)
        chosen = _choose(logits[0, -1], temperature, top_p, generator)
        yield chosen
        tokens = torch.tensor([[chosen]], dtype=torch.uint8, device=device)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("expected finite logits, some are not: the model diverged. Take an earlier snapshot")
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double().cpu() / temperature, dim=0)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # the likeliest always stays: nothing comes before it
        probabilities = probabilities.index_fill(0, order[before >= top_p], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))
