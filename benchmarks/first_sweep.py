"""What the first sweep holds at its peak, and the whole gradient: with the graph of a chunk, and without.

    python -m benchmarks.first_sweep             # a minute; writes results/first_sweep.json

Nobody goes back through the first sweep, so what operations save for their backward passes is dropped on the spot
(`sweep/graphless.py`). Its chunks then fit where those of the reverse sweep do not; and where little else is held, the
peak of a gradient is that of the reverse sweep alone. In bytes of tensors, without parameters and tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch

import slimgrad as sg
from benchmarks.measure import LiveBytes, save
from slimgrad.models import Performer, PerformerConfig

SIZES = [(2, 128, 4096, 512), (4, 256, 8192, 1024)]  # layers, width, tokens, tokens of a chunk


def measure(layers: int, width: int, length: int, chunk: int) -> dict[str, int]:
    """Bytes of tensors at the peak of the first sweep, and of all."""
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=layers, width=width, heads=4))
    tokens = torch.randint(0, 256, (1, length), dtype=torch.uint8)
    peaks: dict[str, int] = {}

    def look(event: sg.Event) -> None:
        peaks[event.phase] = live.peak

    with LiveBytes() as live:
        sg.backward(model, tokens, chunk=chunk, schedule=sg.Rebuild(), on_chunk=look)
    return {"first_sweep_bytes": peaks["forward"], "gradient_bytes": live.peak}


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        row: dict[str, Any] = dict(zip(("layers", "width", "length", "chunk"), size, strict=True))
        without = measure(*size)
        with patch("slimgrad.sweep.run.graphless", nullcontext):  # gradients are on around it
            kept = measure(*size)
        row |= without | {f"{name}_with_graph": value for name, value in kept.items()}
        rows.append(row)
        print(row, flush=True)
    print(save("first_sweep", rows))


if __name__ == "__main__":
    main()
