"""Time of one gradient over plain backpropagation, interleaved, under default malloc and with a warm heap.

    python -m benchmarks.speed             # writes results/speed.json

Beside each ratio of times: the FLOPs counted, over plain's, and the floor 1 + (s - 1 + 1/6) / (3 s) * (N - 1) / N that
the method cannot go under (s layers, N chunks).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

from benchmarks.measure import MALLOC, Case, count_flops, save
from slimgrad.models import get_preset

CASES = {"I": (8192, (1024, 256)), "II": (1024, (256,)), "III": (4096, (512, 256))}


def floor(layers: int, num_chunks: int) -> float:
    return 1 + (layers - 1 + 1 / 6) / (3 * layers) * (num_chunks - 1) / num_chunks


def measure(name: str, repeats: int) -> dict[str, list[float]]:
    """Seconds per method, one after the other within each round."""
    length, chunks = CASES[name]
    cases = {"plain": Case(model=name, length=length, method="plain")}
    cases |= {str(c): Case(model=name, length=length, method="rebuild", chunk=c) for c in chunks}
    model, tokens, targets = cases["plain"].build()
    seconds: dict[str, list[float]] = {key: [] for key in cases}
    for round_ in range(repeats + 1):
        for key, case in cases.items():
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            case.gradient(model, tokens, targets)
            if round_:  # the first round warms up
                seconds[key].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.repeats)))
        return
    rows: list[dict[str, Any]] = []
    for name, (length, chunks) in CASES.items():
        layers = get_preset(name).model.layers
        plain_flops = count_flops(Case(model=name, length=length, method="plain"))
        flops = {c: count_flops(Case(model=name, length=length, method="rebuild", chunk=c)) for c in chunks}
        for malloc in ("default", "warm"):
            command = [sys.executable, "-m", "benchmarks.speed", "--child", name, "--repeats", str(arguments.repeats)]
            done = subprocess.run(
                command, env={**os.environ, **MALLOC[malloc]}, check=True, capture_output=True, text=True
            )
            seconds = json.loads(done.stdout.splitlines()[-1])
            for chunk in chunks:
                ratios = [ours / plain for ours, plain in zip(seconds[str(chunk)], seconds["plain"], strict=True)]
                rows.append(
                    {
                        "model": name,
                        "length": length,
                        "chunk": chunk,
                        "malloc": malloc,
                        "plain_seconds": median(seconds["plain"]),
                        "seconds": median(seconds[str(chunk)]),
                        "time_ratio": median(ratios),
                        "time_ratio_min": min(ratios),
                        "time_ratio_max": max(ratios),
                        "flops_ratio": flops[chunk] / plain_flops,
                        "flops_floor": floor(layers, -(-length // chunk)),
                    }
                )
                print(rows[-1], flush=True)
    save("speed", rows)


if __name__ == "__main__":
    main()
