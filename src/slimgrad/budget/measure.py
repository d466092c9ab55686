"""The most memory that a piece of work takes above what the process held before it, and its seconds.

A peak belongs to a process, and what the allocator was given it rarely gives back. So work is measured in a fresh
Python: `call_in_child` calls a function there, which does something small of the same kind first, since that loads what
torch loads lazily, and then hands the work to `measure_peak`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from slimgrad.budget.process import peak_resident_bytes, reset_peak, resident_bytes
from slimgrad.errors import RunError

# Settings of glibc's malloc, as a process' environment. default: as a user finds it. returned: blocks from 1 MiB up are
# mapped one by one, and so returned when they are freed; resident memory is then what is in use. mapped: from 64 KiB
# up, for small models. warm: nothing that was freed is returned, so nothing is faulted in twice.
MALLOC = {
    "default": {},
    "returned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    "mapped": {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
    "warm": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)},
}


class Measured(NamedTuple):
    """Peak bytes above those before (None where the platform does not tell), and seconds."""

    peak_bytes: int | None
    seconds: float


def measure_peak(work: Callable[[], object], device: str = "cpu") -> Measured:
    """Do the work: resident bytes on the CPU, on CUDA those that torch's allocator gave out."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident_bytes() if reset_peak() else None
    seconds = measure_seconds(work, device)
    after = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes()
    return Measured(None if before is None or after is None else max(after - before, 0), seconds)


def measure_seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Do the work, to its end on the device."""
    began = perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - began


def measure_in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each work per round, one after the other, so that what disturbs one disturbs all.

    A first round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            taken = measure_seconds(work, device)
            if round_:
                seconds[name].append(taken)
    return seconds


def call_in_child(
    function: str, task: Mapping[str, Any], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Any:
    """Call a function in a fresh Python, and return what it returned.

    Args:
        function: "module:name".
        task: its keywords, plain enough for JSON, as the result must be.
        environment: what is set beside this process' own environment, as settings of malloc.
        folder: where the child works; None: here.

    Raises:
        RunError: the child ended without a result; the last line that it printed to standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import answer; answer()"],
        input=json.dumps({"function": function, "task": task}),
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunError(words[-1])
    return json.loads(done.stdout.splitlines()[-1])


def answer() -> None:
    """The child's side: the call from standard input, the result as the last line of standard output."""
    call = json.load(sys.stdin)
    module, _, name = call["function"].partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(**call["task"])))
