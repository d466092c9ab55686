"""What glibc's malloc makes of one chunked gradient: configuration III at C = 256, under one setting after the other.

    python -m benchmarks.malloc [--rounds 3]      # a quarter of an hour on one core; writes results/malloc.json

Each gradient is the trade-off's own point, in a process of its own and in one thread. The settings take turns, so that
what disturbs one disturbs all. docs/decisions/0006-malloc.md says what follows from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import Case, count_live_bytes, save
from slimgrad.paper.programme import run_points
from slimgrad.paper.tradeoff import tradeoff_points
from slimgrad.runs.stopping import Stop

POINT = "III blocked chunked 256 default"
SETTINGS: list[dict[str, str]] = [
    {},
    *({"MALLOC_MMAP_THRESHOLD_": str(kib << 10)} for kib in (64, 128, 1024, 3072, 6144)),
    {"MALLOC_ARENA_MAX": "1"},
    {"MALLOC_TRIM_THRESHOLD_": str(128 << 10)},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes
    torch.set_num_threads(1)  # of this one, which the results name
    found = [measure_all() for _ in range(rounds)]
    live = count_live_bytes(Case(model="III", length=4096, method="rebuild", chunk=256))
    rows: list[dict[str, Any]] = []
    for setting, results in zip(SETTINGS, zip(*found, strict=True), strict=True):
        row: dict[str, Any] = {"setting": setting, "live_bytes": live}
        row |= {name: [result[name] for result in results] for name in ("peak_bytes", "seconds")}
        rows.append(row)
        words = " ".join(f"{name}={value}" for name, value in setting.items()) or "default"
        print(f"{words:32} {median(row['peak_bytes']) / 1e6:5.0f} MB {median(row['seconds']):5.1f} s")
    print(f"{'alive at the peak, with gradients':34} {live / 1e6:3.0f} MB")
    print(save("malloc", rows))


def measure_all() -> list[dict[str, Any]]:
    """Peak and seconds of one gradient under each setting."""
    point = next(point for point in tradeoff_points() if point.name == POINT)
    points = [dataclasses.replace(point, environment=setting) for setting in SETTINGS]
    with tempfile.TemporaryDirectory() as scratch:
        return [row["result"] for row in run_points(points, Path(scratch), lambda _: None, Stop())]


if __name__ == "__main__":
    main()
