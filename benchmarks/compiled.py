"""A gradient of a compiled model beside the eager one: time, time of the first call, how many graphs, how far apart.

    python -m benchmarks.compiled             # writes results/compiled.json; the first calls take minutes

The Performer is compiled whole, the gated loop by its chunk (which is its whole forward). Both are models of two layers
or one, in float32, one thread, default malloc; eager and compiled calls are interleaved. Errors are those of all
gradients against the eager sweep's, over the same model in the same process.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import slimgrad as sg
from benchmarks.measure import save
from slimgrad.budget.measure import call_in_child
from slimgrad.models import Performer, PerformerConfig

CASES = {
    "gated loop, width 64, batch 8": (512, 16),
    "Performer, d 128, chunk 256": (4096, 256),
    "Performer, d 128, chunk 1024": (4096, 1024),
    "Performer, d 512, chunk 256": (2048, 256),
    "Performer, d 512, chunk 1024": (2048, 1024),
}


class GatedLoop(nn.Module):
    """h <- z h + (1 - z) c, token by token: what eager PyTorch is slowest at."""

    def __init__(self, width: int = 64, vocabulary: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.gate, self.candidate = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.head.weight.new_zeros(batch_size, self.head.in_features)

    def forward(self, tokens: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        z, c, steps = torch.sigmoid(self.gate(x)), torch.tanh(self.candidate(x)), []
        for t in range(tokens.shape[1]):
            h = z[:, t] * h + (1 - z[:, t]) * c[:, t]
            steps.append(h)
        return self.head(torch.stack(steps, 1)), h


def gradient(model: nn.Module, tokens: Tensor, chunk: int) -> tuple[float, dict[str, Tensor]]:
    """Processor seconds, and the gradients, taken off the model."""
    start = time.process_time()
    sg.backward(model, tokens, chunk=chunk)
    seconds = time.process_time() - start
    found = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return seconds, found


def measure(name: str, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    length, chunk = CASES[name]
    if name.startswith("gated"):
        model, tokens = GatedLoop(), torch.randint(0, 64, (8, length))
    else:
        width = int(name.split("d ")[1].split(",")[0])
        model = Performer(PerformerConfig(layers=2, width=width, heads=width // 64))
        tokens = torch.randint(0, 256, (1, length))
    eager = gradient(model, tokens, chunk)[1]
    compiled = torch.compile(model, dynamic=False)
    start = time.perf_counter()
    found = gradient(compiled, tokens, chunk)[1]
    first = time.perf_counter() - start
    difference = sum(float((found[n] - g).norm()) ** 2 for n, g in eager.items()) ** 0.5
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(repeats):
        seconds["eager"].append(gradient(model, tokens, chunk)[0])
        seconds["compiled"].append(gradient(compiled, tokens, chunk)[0])
    return {
        "case": name,
        "length": length,
        "chunk": chunk,
        "eager_seconds": median(seconds["eager"]),
        "compiled_seconds": median(seconds["compiled"]),
        "first_call_seconds": first,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "error": difference / sum(float(g.norm()) ** 2 for g in eager.values()) ** 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in CASES:
        rows.append(call_in_child("benchmarks.compiled:measure", {"name": name, "repeats": arguments.repeats}))
        print(rows[-1], flush=True)
        save("compiled", rows)


if __name__ == "__main__":
    main()
