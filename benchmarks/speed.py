"""Time of one gradient over plain backpropagation, interleaved, under default malloc and with a warm heap.

    python -m benchmarks.speed             # writes results/speed.json

Beside each ratio of times: the FLOPs counted, over plain's, and the floor 1 + (s - 1 + 1/6) / (3 s) * (N - 1) / N that
the method cannot go under (s layers, N chunks).
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median
from typing import Any

from benchmarks.measure import Case, count_flops, save
from slimgrad.budget.measure import MALLOC, call_in_child, measure_in_turn
from slimgrad.bytelm.presets import get_preset

CASES = {"I": (8192, (1024, 256)), "II": (1024, (256,)), "III": (4096, (512, 256))}


def floor(layers: int, num_chunks: int) -> float:
    return 1 + (layers - 1 + 1 / 6) / (3 * layers) * (num_chunks - 1) / num_chunks


def measure(name: str, repeats: int) -> dict[str, list[float]]:
    """Seconds per method, one after the other within each round."""
    length, chunks = CASES[name]
    cases = {"plain": Case(model=name, length=length, method="plain")}
    cases |= {str(c): Case(model=name, length=length, method="rebuild", chunk=c) for c in chunks}
    model, tokens, targets = cases["plain"].build()

    def gradient(case: Case) -> None:
        model.zero_grad(set_to_none=True)
        case.gradient(model, tokens, targets)

    return measure_in_turn({key: partial(gradient, case) for key, case in cases.items()}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (length, chunks) in CASES.items():
        layers = get_preset(name).model.layers
        plain_flops = count_flops(Case(model=name, length=length, method="plain"))
        flops = {c: count_flops(Case(model=name, length=length, method="rebuild", chunk=c)) for c in chunks}
        for malloc in ("default", "warm"):
            task = {"name": name, "repeats": arguments.repeats}
            seconds = call_in_child("benchmarks.speed:measure", task, environment=MALLOC[malloc])
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
