"""The most memory that a piece of work takes above what the process held before it, its seconds, and on what."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, NamedTuple

import torch

from slimgrad.bytelm.memory import PROC, proc_status
from slimgrad.runs.environment import describe_environment

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
    """Do the work: resident bytes on the CPU (Linux), on CUDA those that torch's allocator gave out."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = proc_status("VmRSS")
        try:
            (PROC / "clear_refs").write_text("5")  # the peak starts anew
        except OSError:  # not Linux, or a container that forbids it
            before = None
    seconds = measure_seconds(work, device)
    after = torch.cuda.max_memory_allocated() if device == "cuda" else proc_status("VmHWM")
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


def describe_machine() -> dict[str, Any]:
    """What a figure was measured on: processor, GPU, threads, versions."""
    info = PROC.parent / "cpuinfo"
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    versions = {"python": platform.python_version(), "system": platform.system()}
    return {"cpu": cpu, **gpu, **describe_environment(), **versions}


def available_bytes(device: str = "cpu") -> int | None:
    """Memory that could still be had; None where the platform does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = (PROC.parent / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
