"""What looking costs: the share of a gradient that goes into its checks.

    python -m benchmarks.checks             # about two minutes; writes results/checks.json

`search` is the walk through each chunk's graph for leaves that nobody gathers, `notes` the looks at the modules'
attributes, `guard` the versions of weights and buffers, `bits` the checksums of states, `read` those of what was read.
Processor seconds, counted within the call itself, with the clock's own cost.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

import slimgrad as sg
from benchmarks.compiled import GatedLoop
from benchmarks.measure import save
from slimgrad.call import guard, watch
from slimgrad.call import model as shared
from slimgrad.call.source import SequenceData
from slimgrad.models import Performer, PerformerConfig
from slimgrad.states.sums import SumCarrier
from slimgrad.states.tensors import TensorCarrier

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "gated loop, 1,024 steps a chunk": (GatedLoop, (8, 4096, 64), 1024),
    "gated loop, 16 steps a chunk": (GatedLoop, (8, 512, 64), 16),
    "Performer, 2 layers, d 128, chunk 64": (
        lambda: Performer(PerformerConfig(layers=2, width=128, heads=2)), (1, 2048, 256), 64,
    ),
    "Performer, 3 layers, d 512, chunk 256": (
        lambda: Performer(PerformerConfig(layers=3, width=512, heads=8)), (1, 1024, 256), 256,
    ),
}  # fmt: skip


class Clock:
    """Adds up the time spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, owner: Any, function: str, name: str) -> None:
        timed = getattr(owner, function)

        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return timed(*args, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

        setattr(owner, function, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    clock = Clock()
    clock.around(shared, "find_strangers", "search")
    clock.around(watch.Notes, "__init__", "notes")
    clock.around(guard.Guard, "_weights", "guard")
    for kind in (SumCarrier, TensorCarrier):
        clock.around(kind, "checksum", "bits")
    clock.around(SequenceData, "checksums", "read")
    rows: list[dict[str, Any]] = []
    for case, (build, (batch, length, vocabulary), chunk) in CASES.items():
        torch.manual_seed(0)
        model, tokens = build(), torch.randint(0, vocabulary, (batch, length))
        sg.backward(model, tokens, chunk=chunk)
        shares: dict[str, list[float]] = {}
        for _ in range(repeats):
            clock.seconds.clear()
            start = time.process_time()
            sg.backward(model, tokens, chunk=chunk)
            total = time.process_time() - start
            for name, seconds in clock.seconds.items():
                shares.setdefault(name, []).append(seconds / total)
        rows.append({"case": case, "seconds": total, "share": {name: median(s) for name, s in shares.items()}})
        print(rows[-1], flush=True)
    save("checks", rows)


if __name__ == "__main__":
    main()
