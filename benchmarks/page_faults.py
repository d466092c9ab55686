"""What touching fresh pages costs a long and thin model, by what malloc does with large blocks.

    python -m benchmarks.page_faults [--rounds 3]      # a few minutes; writes results/page_faults.json

One exact gradient of a Performer of two layers, width 128, over 64 chunks, under the settings of
`slimgrad.budget.available`, each in a process of its own, taking turns. What follows is in
docs/decisions/0011-budget.md.
"""

from __future__ import annotations

import argparse
import resource
from statistics import median
from time import perf_counter
from typing import Any

import torch

import slimgrad as sg
from benchmarks.measure import save
from slimgrad.budget import available, process
from slimgrad.budget.measure import call_in_child
from slimgrad.models import Performer, PerformerConfig

SETTINGS, SIZES, CHUNKS = ("default", "returned", "kept"), (1024, 2048), 64


def measure(setting: str, chunk: int) -> dict[str, Any]:
    """The child's side."""
    if setting != "default":
        available.set_malloc(setting)
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=2, width=128, heads=2))
    tokens = torch.randint(256, (1, CHUNKS * chunk))
    sg.backward(model, tokens[:, : 4 * chunk], chunk=chunk, schedule=sg.Rebuild())
    available.trim()
    process.reset_peak()
    held, faults, began = process.resident_bytes() or 0, _faults(), perf_counter()
    sg.backward(model, tokens, chunk=chunk, schedule=sg.Rebuild())
    return {
        "seconds": perf_counter() - began,
        "faults": _faults() - faults,
        "peak_bytes": (process.peak_resident_bytes() or 0) - held,
    }


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    cases = [(setting, chunk) for chunk in SIZES for setting in SETTINGS]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for setting, chunk in cases:
            task = {"setting": setting, "chunk": chunk}
            found[setting, chunk].append(call_in_child("benchmarks.page_faults:measure", task))
    rows: list[dict[str, Any]] = []
    for (setting, chunk), results in found.items():
        row = {name: [result[name] for result in results] for name in results[0]}
        rows.append({"malloc": setting, "chunk": chunk, "tokens": CHUNKS * chunk, **row})
        speed, faults = CHUNKS * chunk / median(row["seconds"]), median(row["faults"]) / CHUNKS
        print(
            f"{setting:9} {chunk:5}  {speed:8,.0f} tokens/s  {faults:8,.0f} page faults a chunk  "
            f"{median(row['peak_bytes']) / 1e6:5.0f} MB"
        )
    print(save("page_faults", rows))


if __name__ == "__main__":
    main()
