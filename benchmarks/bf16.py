"""One gradient in bfloat16 (autocast around the call) beside float32: time, and error against float64.

    python -m benchmarks.bf16             # writes results/bf16.json

Parameters, states, adjoints and gathered gradients are float32 either way. Per configuration of the paper: plain
backpropagation and slimgrad in both precisions take turns in one process; errors are those of all gradients together
against plain backpropagation in float64, and `same_bits` says whether `Rebuild` and `Keep` agree in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import slimgrad as sg
from benchmarks.measure import Case, save
from slimgrad.budget.measure import MALLOC, call_in_child, measure_in_turn
from slimgrad.models import Performer
from slimgrad.verification.reference import plain_backward

CASES = {"I": (8192, 1024), "II": (1024, 256), "III": (4096, 512)}
PRECISIONS = ("float32", "bf16")


def gradient(model: Performer, tokens: Tensor, targets: Tensor, schedule: sg.Schedule | None, chunk: int) -> None:
    """By slimgrad, or plainly where there is no schedule; what was there before is dropped."""
    model.zero_grad()
    if schedule is None:
        plain_backward(model, tokens, targets)
    else:
        sg.backward(model, tokens, targets, chunk=chunk, schedule=schedule)


def taken(model: Performer) -> list[Tensor]:
    return [p.grad.double() for p in model.parameters() if p.grad is not None]


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    off = sum(float((a - b).square().sum()) for a, b in zip(found, truth, strict=True))
    return (off / sum(float(b.square().sum()) for b in truth)) ** 0.5


def measure(name: str, repeats: int, threads: int) -> list[dict[str, Any]]:
    """The rows of one configuration."""
    torch.set_num_threads(threads)
    length, chunk = CASES[name]
    model, tokens, targets = Case(model=name, length=length, method="plain").build()
    wide = copy.deepcopy(model).double()
    gradient(wide, tokens, targets, None, chunk)
    truth = taken(wide)
    del wide

    def run(precision: str, schedule: sg.Schedule | None) -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            gradient(model, tokens, targets, schedule, chunk)

    ways = [(precision, way) for precision in PRECISIONS for way in ("plain", "slimgrad")]
    works = {
        f"{way} {precision}": partial(run, precision, None if way == "plain" else sg.Rebuild())
        for precision, way in ways
    }
    errors: dict[str, float] = {}
    for key, work in works.items():
        work()
        errors[key] = distance(taken(model), truth)
    rebuilt = taken(model)
    run("bf16", sg.Keep())
    same = all(torch.equal(a, b) for a, b in zip(rebuilt, taken(model), strict=True))
    seconds = measure_in_turn(works, repeats)
    return [
        {
            "model": name, "length": length, "chunk": chunk, "way": way, "precision": precision, "threads": threads,
            "seconds": median(seconds[f"{way} {precision}"]), "least": min(seconds[f"{way} {precision}"]),
            "most": max(seconds[f"{way} {precision}"]), "error": errors[f"{way} {precision}"],
            **({"same_bits": same} if (way, precision) == ("slimgrad", "bf16") else {}),
        }
        for precision, way in ways
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in CASES:
        task = {"name": name, "repeats": options.repeats, "threads": options.threads}
        rows += call_in_child("benchmarks.bf16:measure", task, environment=MALLOC["default"])
        for row in rows[-4:]:
            print(row, flush=True)
    save("bf16", rows)


if __name__ == "__main__":
    main()
