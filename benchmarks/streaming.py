"""Evaluation and generation over any length: their memory, and the time per token early and late.

    python -m benchmarks.streaming RUN FILE      # writes results/streaming.json

`slimgrad eval RUN FILE` runs in a process of its own; its peak is the kernel's. Of generation, two streams from one
model are timed token by token in turns: one at its 10th token on, one at its 100,000th.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import save
from slimgrad.budget.process import resident_bytes
from slimgrad.bytelm import open_model, stream


def describe(run: Path) -> str:
    """A model's size, in words."""
    model, _ = open_model(run)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters"


def evaluation(run: Path, file: Path, chunk: int) -> dict[str, Any]:
    """What `slimgrad eval` says of itself."""
    command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "eval", str(run), str(file)]
    command += ["--chunk", str(chunk)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    bits = re.search(r"([\d.]+) bits per byte", said)
    cost = re.search(r"predicted in ([\d,]+) s .* at most ([\d,]+) MB", said)
    assert bits, said
    assert cost, said
    seconds, megabytes = (int(number.replace(",", "")) for number in cost.groups())
    what = {
        "what": "eval",
        "model": describe(run),
        "chunk": chunk,
        "file": file.name,
        "bytes": file.stat().st_size,
        "bits_per_byte": float(bits[1]),
    }
    return {**what, "seconds": seconds, "peak_resident_mb": megabytes}


def generation(run: Path, early: int, late: int, tokens: int) -> list[dict[str, Any]]:
    """Seconds per token of two streams in turns, and the memory of the process when each was where it was timed."""
    model, _ = open_model(run)
    size = describe(run)
    streams = {place: stream(model, b"\n", place + tokens, temperature=0.7) for place in (early, late)}
    held: dict[int, int | None] = {}
    for place, one in streams.items():
        for _ in itertools.islice(one, place):
            pass
        held[place] = resident_bytes()
    seconds: dict[int, list[float]] = {place: [] for place in streams}
    for _ in range(tokens):
        for place, one in streams.items():
            began = time.perf_counter()
            next(one)
            seconds[place].append(time.perf_counter() - began)
    return [
        {
            "what": "generate",
            "model": size,
            "token": place,
            "median_seconds": median(seconds[place]),
            "resident_bytes": held[place],
        }
        for place in streams
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--early", type=int, default=10)
    parser.add_argument("--late", type=int, default=100_000)
    parser.add_argument("--chunk", type=int, default=1024, help="of the evaluation")
    parser.add_argument("--tokens", type=int, default=1000, help="how many are timed at each place")
    given = parser.parse_args()
    rows = generation(given.run, given.early, given.late, given.tokens)
    save("streaming", rows)
    for file in given.files:
        rows.append(evaluation(given.run, file, given.chunk))
        save("streaming", rows)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
