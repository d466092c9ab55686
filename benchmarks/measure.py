"""Measuring one gradient: resident memory in a child process, live tensor bytes, FLOPs, time.

Every figure comes with what it was measured on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import slimgrad as sg
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.measure import MALLOC, call_in_child, measure_peak
from slimgrad.bytelm.gradient import layers_computed_twice
from slimgrad.bytelm.presets import get_preset
from slimgrad.models import Performer, PerformerConfig
from slimgrad.paper.machine import describe_machine
from slimgrad.verification.reference import plain_backward

RESULTS = Path(__file__).parent / "results"
SMALL = "small"
SCHEDULES: dict[str, Callable[[], sg.Schedule]] = {
    "rebuild": sg.Rebuild,
    "keep": sg.Keep,
    "every": lambda: sg.Every(32),
    "binomial": lambda: sg.Binomial(8),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One gradient: a model, a length, and how it is computed ("plain", "checkpoint", or a schedule's name)."""

    model: str
    length: int
    method: str
    chunk: int = 0

    def build(self) -> tuple[Performer, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        small = PerformerConfig(layers=1, width=128, heads=2)
        model = Performer(small if self.model == SMALL else get_preset(self.model).model)
        tokens = torch.randint(0, 256, (1, self.length), dtype=torch.uint8)
        return model, tokens, torch.randint(0, 256, (1, self.length), dtype=torch.uint8).to(torch.int16)

    def gradient(self, model: Performer, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        if self.method in SCHEDULES:
            sg.backward(model, tokens, targets, chunk=self.chunk, schedule=SCHEDULES[self.method]())
            return
        with layers_computed_twice(model) if self.method == "checkpoint" else nullcontext():
            plain_backward(model, tokens, targets)


def count_flops(case: Case) -> int:
    """Floating-point operations of the matrix products of one gradient."""
    model, tokens, targets = case.build()
    return flops_of(lambda: case.gradient(model, tokens, targets))


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that `work` computes, those added up in place among them."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE_FLOPS) as counter:
        work()
    return counter.get_total_flops()


def addmm_flops(self_shape: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def baddbmm_flops(self_shape: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


# torch counts none of what these do
IN_PLACE_FLOPS = {torch.ops.aten.addmm_: addmm_flops, torch.ops.aten.baddbmm_: baddbmm_flops}


def count_live_bytes(case: Case) -> int:
    """Peak bytes of tensors that one gradient makes: activations, states, gradients."""
    model, tokens, targets = case.build()
    with LiveBytes() as live:
        case.gradient(model, tokens, targets)
    return live.peak


def measure_child(case: dict[str, Any]) -> dict[str, float]:
    """In the child process: peak resident bytes above those before the gradient, and its seconds (Linux).

    From the kernel's high-water mark of this address space, reset first. `getrusage` would not do: its maximum survives
    fork and exec, so a child starts with its parent's.
    """
    one = Case(**case)
    model, tokens, targets = one.build()
    # what is loaded and filled once (kernels, thread pools, Python's free lists) is not the gradient's
    warm = Case(model=one.model, length=2048 if one.chunk else 64, method=one.method, chunk=min(one.chunk, 8))
    warm.gradient(*warm.build())
    peak, seconds = measure_peak(lambda: one.gradient(model, tokens, targets))
    if peak is None:
        raise SystemExit("resident memory: expected Linux's /proc, which tells it")
    return {"resident_bytes": peak, "seconds": seconds}


def run_child(case: Case, malloc: str) -> dict[str, float]:
    """Measure `case` in a process of its own."""
    return call_in_child("benchmarks.measure:measure_child", {"case": asdict(case)}, environment=MALLOC[malloc])


def save(name: str, rows: list[dict[str, Any]], arguments: Sequence[str] | None = None) -> Path:
    """Write rows with their origin to `results/<name>.json`: the command as it was given, or with other arguments in
    the place of paths of one machine.
    """
    command = " ".join(["python -m", f"benchmarks.{name}", *(sys.argv[1:] if arguments is None else arguments)])
    return write(RESULTS / f"{name}.json", command, rows)


def write(path: Path, command: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows with the command and the machine that measured them."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"command": command, "machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    return path


@contextmanager
def timed() -> Iterator[list[float]]:
    """Append the block's wall-clock seconds to the list it yields."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)
