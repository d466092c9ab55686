"""Plans against what happened: predicted and measured peak and seconds, over models, budgets and lengths.

    python -m benchmarks.budget              # about half an hour on one core, resumable; writes results/budget.json
    python -m benchmarks.budget --quick      # two models

The budgets are what the process holds, and one, two, four and eight times the least that a plan needs beside it. A
model is measured, and its plans are made and carried out one after the other, in a process of its own with one thread:
as in slimgrad's commands ("command": plans choose what malloc does with large blocks), and as in a
library ("default": malloc as it is). Peaks are resident, of the whole process. Beside ours, over the same tokens: plain
backpropagation, and per-layer checkpointing where the model is a Performer.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import slimgrad as sg
from benchmarks.measure import RESULTS, save
from slimgrad.budget import available, process
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.measure import call_in_child
from slimgrad.bytelm.gradient import layers_computed_twice
from slimgrad.bytelm.presets import PRESETS
from slimgrad.errors import RunError
from slimgrad.models import Cached, Gated, Performer, Windowed
from slimgrad.verification.reference import plain_backward

TIMES = (1, 2, 4, 8)  # the least that a plan needs
LENGTHS = {"I": 4096, "II": 4096, "III": 4096, "IV": 4096}
OTHERS = {"gated": 32_768, "window": 32_768, "gru": 16_384, "cache": 8192, "cache with a window": 16_384}
LONGER = 4  # times these, once
MALLOCS = ("command", "default")
PLAIN, CHECKPOINT, OURS = "plain", "checkpoint", "ours"


class Gru(nn.Module):
    """torch's own recurrence, its state a plain tensor."""

    def __init__(self, width: int = 128, vocabulary: int = 256) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(vocabulary, width), nn.GRU(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.head.weight.new_zeros(2, batch_size, self.gru.hidden_size)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, state = self.gru(self.embed(inputs), state)
        return self.head(hidden), state


def build(name: str) -> tuple[nn.Module, int]:
    """A model, and its vocabulary."""
    torch.manual_seed(0)
    if name in PRESETS:
        return Performer(PRESETS[name].model), 256
    made: dict[str, tuple[Any, int]] = {
        "gated": (Gated, 256), "gru": (Gru, 256), "window": (Windowed, 13), "cache": (Cached, 13),
        "cache with a window": (Cached, 13),
    }  # fmt: skip
    kind, vocabulary = made[name]
    return kind(width=128, **({"window": 512} if name == "cache with a window" else {})), vocabulary


def measure(model: str, length: int, malloc: str) -> list[dict[str, Any]]:
    """The child's side: every plan of one model."""
    torch.set_num_threads(1)
    if malloc == "command":
        available.let_plans_set_malloc()
    made, vocabulary = build(model)
    tokens = torch.randint(vocabulary, (1, LONGER * length))
    began = perf_counter()
    sg.plan(made, tokens[:, :length], memory=1 << 40)  # measures
    planning = perf_counter() - began
    rows: list[dict[str, Any]] = []
    # a heap that has kept much is no longer as it was: plans that keep blocks come last, as far as budgets tell
    for times, long in sorted((*((times, length) for times in TIMES), (2, LONGER * length))):
        held, least = _least(made, tokens[:, :long])
        memory = held + int(times * (least - held))
        row = {"model": model, "length": long, "malloc": malloc, "method": OURS, "times": times}
        row |= {"held_bytes": held, "least_bytes": least - held, "planning_seconds": planning}
        rows.append(row | _ours(made, tokens[:, :long], memory))
    return rows


def _least(model: nn.Module, tokens: Tensor) -> tuple[int, int]:
    """What is held, and the least budget that a plan can be made for."""
    held = available.held_bytes(torch.device("cpu")) or 0
    low, high = held, held + (64 << 20)

    def fits(memory: int) -> bool:
        with suppress(sg.InputError):
            sg.plan(model, tokens, memory=memory)
            return True
        return False

    while not fits(high):
        low, high = high, high + (high - held)
    while high - low > 1 << 20:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return held, high


def _ours(model: nn.Module, tokens: Tensor, memory: int) -> dict[str, Any]:
    plan = sg.plan(model, tokens, memory=memory)
    row = _measured(lambda: sg.backward(model, tokens, plan=plan))
    model.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        sg.backward(model, tokens, plan=plan)
    model.zero_grad(set_to_none=True)
    beside = ("weights", "everything else that was there", "allocator", "nodes of graphs")
    counted = sum(num_bytes for name, num_bytes in plan.account.items() if name not in beside)
    return row | {
        "plan": plan.to_dict(), "predicted_bytes": plan.peak, "predicted_seconds": plan.seconds,
        "live_bytes": live.peak, "predicted_live_bytes": counted,
    }  # fmt: skip


def measure_other(model: str, length: int, method: str) -> list[dict[str, Any]]:
    """The child's side: a gradient whose graph is held whole, under malloc as it is."""
    torch.set_num_threads(1)
    made, vocabulary = build(model)
    tokens = torch.randint(vocabulary, (1, length))
    row = {"model": model, "length": length, "malloc": "default", "method": method}
    return [row | _measured(lambda: _other(made, tokens, method))]


def _other(model: nn.Module, tokens: Tensor, method: str) -> None:
    if method == PLAIN:
        plain_backward(model, tokens)
        return
    assert isinstance(model, Performer)
    with layers_computed_twice(model):
        plain_backward(model, tokens)


def _measured(work: Callable[[], Any]) -> dict[str, Any]:
    gc.collect()
    available.trim()
    process.reset_peak()
    before, began = process.resident_bytes(), perf_counter()
    work()
    return {"seconds": perf_counter() - began, "before_bytes": before, "peak_bytes": process.peak_resident_bytes()}


def tasks(names: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """What is called in a child of its own, one after the other: the presets first."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        length = (LENGTHS | OTHERS)[name]
        found += [("measure", {"model": name, "length": length, "malloc": malloc}) for malloc in MALLOCS]
        methods = (PLAIN, CHECKPOINT) if name in LENGTHS else (PLAIN,)
        found += [("measure_other", {"model": name, "length": length, "method": method}) for method in methods]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="append", default=[], metavar="MODEL", help="measure this model anew")
    torch.set_num_threads(1)  # as in the children; the results name it
    options = parser.parse_args()
    names = ["II", "gated"] if options.quick else [*LENGTHS, *OTHERS]
    path: Path = RESULTS / "budget.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if "failed" not in row and row["model"] not in options.again]  # these are tried again
    for function, task in tasks(names):
        if any(all(row.get(name) == value for name, value in task.items()) for row in rows):
            continue
        try:
            found = call_in_child(f"benchmarks.budget:{function}", task)
        except RunError as error:
            found = [task | {"failed": str(error)[:300]}]
        for row in found:
            print({name: value for name, value in row.items() if name != "plan"}, flush=True, file=sys.stdout)
        rows += found
        save("budget", rows)


if __name__ == "__main__":
    main()
