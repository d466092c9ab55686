"""Memory that this process may still have, and what its allocator makes of it.

| limit | read from |
|---|---|
| the machine's | MemAvailable of /proc/meminfo |
| the control group's | memory.max less memory.current (version 2), memory.limit_in_bytes less usage (version 1) |
| the process' own | RLIMIT_DATA less VmData, RLIMIT_AS less VmSize |

glibc's malloc, by the name of what it does with large blocks (see docs/decisions/0006-malloc.md):

| name | how | good for |
|---|---|---|
| "default" | up to 32 MiB from its heap, as soon as a mapped one was freed; it is cut up, its end returned | |
| "returned" | from 1 MiB on they are mapped one by one, and returned when they are freed | little memory |
| "kept" | all from its heap, which it keeps: no page is touched for the first time twice | time |
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

from slimgrad.budget import process
from slimgrad.budget.choose import Slack

THRESHOLD = 1 << 20  # bytes of a block from which on it is mapped by itself
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_CGROUP = Path("/sys/fs/cgroup")
_KEPT_FREE = 10  # one in so many of the free bytes is left alone
_TOUCHED = 4 << 20

# Beside the bytes of live tensors. Measured over the models and budgets of benchmarks/results/budget.json.
DEFAULT_MALLOC = Slack("default", threshold=1 << 62, small=1.3, share=0.0, fixed=16 << 20)
RETURNED = Slack("returned", threshold=THRESHOLD, small=1.3, share=0.04, fixed=16 << 20)
KEPT = Slack("kept", threshold=1 << 62, small=1.3, share=0.0, fixed=16 << 20, keeps=True)
CUDA = Slack("", threshold=0, small=0.0, share=0.15, fixed=32 << 20)
# From which size on blocks are mapped, and how much of what is free the heap may end in.
_SETTINGS = {"returned": (THRESHOLD, 1 << 17), "kept": (1 << 30, 1 << 30)}


def free_bytes(device: torch.device) -> int | None:
    """What this process may take beside what it holds, less a tenth; None where nobody tells."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return free - torch.cuda.memory_allocated(device) - free // _KEPT_FREE
    found = [free for free in (_machine(), _control_group(), *_own_limits()) if free is not None]
    return min(found) - min(found) // _KEPT_FREE if found else None


def held_bytes(device: torch.device) -> int | None:
    """What this process holds when nothing lies idle: resident, or on CUDA reserved. None where nobody tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    trim()
    return process.resident_bytes()


def trim() -> None:
    """Give idle memory of malloc's heap back to the system, where malloc is glibc's."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def set_malloc(name: str) -> bool:
    """Have malloc be "returned" or "kept" (see above) from now on. Whether it could be done.

    For a command, whose process is its own: a library that did so would surprise.
    """
    libc = _libc()
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    mapped, free = _SETTINGS[name]
    if not (libc.mallopt(_M_MMAP_THRESHOLD, mapped) and libc.mallopt(_M_TRIM_THRESHOLD, free)):
        return False
    _malloc.name = name
    return True


def let_plans_set_malloc() -> None:
    """From now on each plan chooses what malloc does, and sets it. For a command, whose process is its own."""
    _malloc.is_chosen = set_malloc("returned")


def slacks(device: torch.device) -> tuple[Slack, ...]:
    """What a plan may choose from: the first is what costs are measured under."""
    return (RETURNED, KEPT) if _malloc.is_chosen and device.type == "cpu" else (slack(device),)


def use_malloc(name: str) -> None:
    """Set what a plan has chosen, where plans choose."""
    if _malloc.is_chosen and name in _SETTINGS:
        set_malloc(name)


def slack(device: torch.device) -> Slack:
    """What the allocator of this process takes beside live tensors."""
    if device.type == "cuda":
        return CUDA
    named = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    name = _malloc.name or ("returned" if named.isdecimal() and int(named) <= THRESHOLD else "default")
    return {one.name: one for one in (DEFAULT_MALLOC, RETURNED, KEPT)}[name]


@cache
def fault_seconds() -> float:
    """What one byte costs when it is touched for the first time, beside what it costs later."""

    def touch(x: torch.Tensor) -> float:
        began = perf_counter()
        x.fill_(0)
        return perf_counter() - began

    fresh = torch.empty(_TOUCHED, dtype=torch.uint8)
    return max(0.0, touch(fresh) - touch(fresh)) / _TOUCHED


class _Malloc:
    """What this process has set of it."""

    name = ""
    is_chosen = False


_malloc = _Malloc()


def _libc() -> Any:
    if sys.platform != "linux":
        return None
    with suppress(OSError):
        return ctypes.CDLL(None)
    return None


def _machine() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(ValueError, OSError, AttributeError):  # Unix without /proc
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _control_group() -> int | None:
    """The least that any group from this process' own up to the root leaves."""
    found: list[int] = []
    with suppress(OSError):
        for line in (process.PROC / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, names = _CGROUP, ("memory.max", "memory.current")
            if "memory" in controllers.split(","):
                root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            elif controllers:
                continue
            for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
                with suppress(OSError, ValueError):  # "max" is no number
                    limit, used = (int((folder / name).read_text()) for name in names)
                    found.append(max(0, limit - used))
                if folder == root:
                    break
    return min(found, default=None)


def _own_limits() -> list[int | None]:
    try:
        resource = cast(Any, importlib.import_module("resource"))
    except ImportError:  # Windows
        return []
    left: list[int | None] = []
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most, now = resource.getrlimit(limit)[0], process.proc_status(used)
        if most != resource.RLIM_INFINITY and now is not None:
            left.append(max(0, most - now))
    return left
