"""Softmax attention over a growing cache of keys and values: exact, and linear in the length, as it must be.

    python examples/03_key_value_cache.py

The cache is a `Growing` state: one buffer of rows and one of their gradients. Full attention reads every earlier key,
so these two grow with the sequence; what does not grow is the number of tokens whose graph lives at once. The final
state of a call is the cache itself: text generation goes on from it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import slimgrad as sg

VOCABULARY, WIDTH, CHUNK = 16, 32, 64
State = dict[str, sg.Growing]


class CachedAttention(nn.Module):
    """One layer of causal softmax attention, with sinusoidal positions counted from the cache's length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def initial_state(self, batch_size: int) -> State:
        empty = self.head.weight.new_zeros(batch_size, 0, WIDTH)
        return {"keys": sg.Growing(empty), "values": sg.Growing(empty)}

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        start, time = state["keys"].length, inputs.shape[1]
        positions = torch.arange(start, start + time)
        x = self.embed(inputs)
        x = x + torch.sin(positions[:, None] / 1000 ** torch.linspace(0, 1, WIDTH)).to(x.dtype)
        queries, new_keys, new_values = self.query_key_value(x).chunk(3, dim=-1)
        keys, next_keys = state["keys"].append(new_keys)
        values, next_values = state["values"].append(new_values)
        scores = queries @ keys.transpose(1, 2) / WIDTH**0.5
        future = torch.arange(start + time) > positions[:, None]
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ values
        return self.head(x + mixed), {"keys": next_keys, "values": next_values}


def most_held(model: nn.Module, length: int) -> int:
    """Bytes of state, kept states and adjoint that one gradient held at most."""
    events: list[sg.Event] = []
    sg.backward(model, torch.randint(0, VOCABULARY, (1, length)), chunk=CHUNK, on_chunk=events.append)
    model.zero_grad()
    return max(event.held_bytes for event in events)


def main() -> None:
    torch.manual_seed(0)
    model = CachedAttention()
    print(sg.verify(model, torch.randint(0, VOCABULARY, (2, 200)), chunk=CHUNK))

    print(f"\n{'tokens':>7}  {'cache and its gradient':>22}  {'bytes per token':>15}")
    per_token = []
    for length in (512, 1024, 2048):
        held = most_held(model, length)
        per_token.append(held / length)
        print(f"{length:>7}  {held:>22,}  {per_token[-1]:>15.1f}")
    assert max(per_token) < 1.05 * min(per_token)
    print("linear in the length: each token has a key, a value and their gradients")

    prompt = torch.randint(0, VOCABULARY, (1, 100))
    state = sg.evaluate(model, prompt, chunk=CHUNK).final_state
    token, generated = prompt[:, -1:], []
    with torch.no_grad():
        for _ in range(12):
            logits, state = model(token, state)
            token = logits.argmax(-1)
            generated.append(int(token))
    print(f"\ngoing on from a cache of {prompt.shape[1]} rows: {generated}")


if __name__ == "__main__":
    main()
