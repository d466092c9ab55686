"""Plans against what happened: predicted and measured peak and seconds, over models, budgets and lengths.

    python -m benchmarks.budget              # about an hour on one core, resumable; writes results/budget.json
    python -m benchmarks.budget --quick      # two models

The budgets are what the process holds, and one, two, four and eight times the least that a plan needs beside it. Each
row is a process of its own, with one thread, under glibc's default malloc ("default", as a library is used), or with
blocks from 1 MiB on mapped one by one ("returned", as slimgrad's commands have it). Peaks are resident, of the whole
process. Beside ours, over the same tokens: plain backpropagation, and per-layer checkpointing where the model is a
Performer.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import slimgrad as sg
from benchmarks.measure import RESULTS, save
from slimgrad.budget import available, process
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.measure import call_in_child
from slimgrad.budget.planning import Request, chooser_for
from slimgrad.bytelm.gradient import layers_computed_twice
from slimgrad.bytelm.presets import PRESETS
from slimgrad.call.arguments import Options
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.errors import RunError
from slimgrad.models import Cached, Gated, Performer, Windowed
from slimgrad.verification.reference import plain_backward

TIMES = (1, 2, 4, 8)  # the least that a plan needs
LENGTHS = {"I": 8192, "II": 8192, "III": 8192, "IV": 4096}
OTHERS = {"gated": 32_768, "window": 65_536, "gru": 16_384, "cache": 8192, "cache with a window": 16_384}
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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a model, a length, and what is done."""

    model: str
    length: int
    malloc: str
    method: str = OURS
    times: int = 1
    memory: int = 0  # bytes; 0: `times` the least


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


def measure(**fields: Any) -> dict[str, Any]:
    """The child's side."""
    case = Case(**fields)
    torch.set_num_threads(1)
    if case.malloc == "returned":
        available.return_large_blocks()
    model, vocabulary = build(case.model)
    tokens = torch.randint(vocabulary, (1, case.length))
    if case.method != OURS:
        return _measured(lambda: _other(model, tokens, case.method))
    options = Options(None, 0, None, cross_entropy_sum, "targets", None, None)
    began = perf_counter()
    request = Request(model, tokens, None, options)
    plan, chooser = chooser_for(request, 1 << 50)
    held = sum(plan.account.values()) - chooser.way(plan.chunk, plan.schedule).num_bytes
    planning = perf_counter() - began
    least = chooser.smallest().num_bytes
    memory = case.memory or held + int(case.times * least * 1.02)
    plan = sg.plan(model, tokens, memory=memory)
    row = _measured(lambda: sg.backward(model, tokens, plan=plan))
    model.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        sg.backward(model, tokens, plan=plan)
    beside = ("weights", "everything else that was there", "allocator")
    counted = sum(num_bytes for name, num_bytes in plan.account.items() if name not in beside)
    return row | {
        "plan": plan.to_dict(), "held_bytes": held, "least_bytes": least, "planning_seconds": planning,
        "predicted_bytes": plan.peak, "predicted_seconds": plan.seconds, "predicted_live_bytes": counted,
        "live_bytes": live.peak,
    }  # fmt: skip


def _measured(work: Any) -> dict[str, Any]:
    gc.collect()
    available.trim()
    process.reset_peak()
    before, began = process.resident_bytes(), perf_counter()
    work()
    return {"seconds": perf_counter() - began, "before_bytes": before, "peak_bytes": process.peak_resident_bytes()}


def _other(model: nn.Module, tokens: Tensor, method: str) -> None:
    if method == PLAIN:
        plain_backward(model, tokens)
        return
    assert isinstance(model, Performer)
    with layers_computed_twice(model):
        plain_backward(model, tokens)


def cases(names: list[str]) -> list[Case]:
    """Every row, the presets' first."""
    found: list[Case] = []
    for name in names:
        length = (LENGTHS | OTHERS)[name]
        for malloc in ("returned", "default"):
            found += [Case(model=name, length=length, malloc=malloc, times=times) for times in TIMES]
            methods = (PLAIN, CHECKPOINT) if name in LENGTHS else (PLAIN,)
            found += [Case(model=name, length=length, malloc=malloc, method=method) for method in methods]
        found.append(Case(model=name, length=4 * length, malloc="returned", times=2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    names = ["II", "gated"] if parser.parse_args().quick else [*LENGTHS, *OTHERS]
    path = RESULTS / "budget.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for case in cases(names):
        if any(all(row.get(k) == v for k, v in asdict(case).items()) for row in rows):
            continue
        try:
            row = asdict(case) | call_in_child("benchmarks.budget:measure", asdict(case))
        except RunError as error:
            row = asdict(case) | {"failed": str(error)[:300]}
        rows.append(row)
        print({name: value for name, value in row.items() if name != "plan"}, flush=True)
        save("budget", rows)


if __name__ == "__main__":
    main()
