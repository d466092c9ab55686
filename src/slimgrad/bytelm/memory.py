"""Memory: how much a process holds, how much it may, and how much one gradient takes.

A peak belongs to a process, and what the allocator was given it rarely gives back. So each gradient is measured in a
fresh Python (`python -m slimgrad.bytelm.one_gradient`), which reads its task from standard input and prints one line of
JSON. There, a gradient over a few bytes comes first: it loads what torch loads lazily, and makes the parameters'
gradients, which both ways hold alike. What remains is what the pass itself takes.

| system | the peak is | reset before the pass |
|---|---|---|
| Linux | `VmHWM` of /proc/self/status | yes, where /proc/self/clear_refs allows it |
| macOS and other Unix | `ru_maxrss` of getrusage (bytes on macOS, KiB elsewhere) | no |
| Windows | not measured | |

On Linux `ru_maxrss` would mislead: a child starts with the peak of the process that it was forked from.

A limit (`limit_memory`) is the kernel's: RLIMIT_DATA, which since Linux 4.7 counts every private page that may be
written to, used or not: heap, tensors, the stacks of threads. What would go beyond it is refused, and raises here.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from slimgrad.errors import InputError, MemoryLimitError
from slimgrad.models.performer import PerformerConfig
from slimgrad.sweep.allocation import is_allocation_failure

Method = Literal["slimgrad", "plain"]
PROC = Path("/proc/self")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one gradient took.

    Attributes:
        peak_bytes: the most resident memory during the pass, above what the process held before it; None where the
            platform does not tell.
        seconds: the pass, once.
        note: why there is no figure, else empty.
    """

    peak_bytes: int | None
    seconds: float
    note: str = ""


def resident_bytes() -> int | None:
    """Memory that this process holds now (on Unix without /proc: its peak so far); None where nobody tells."""
    return proc_status("VmRSS") or max_resident_bytes()


def peak_resident_bytes() -> int | None:
    """The most memory that this process held; None where the platform does not tell."""
    return proc_status("VmHWM") or max_resident_bytes()


def limit_memory(num_bytes: int) -> None:
    """Have the kernel refuse this process, and its children, more than that many bytes of data. There is no way back.

    Raises:
        InputError: the platform has no such limit, or the process holds more already.
    """
    held = proc_status("VmData")
    if sys.platform != "linux" or held is None:
        raise InputError("a memory limit: expected Linux, whose RLIMIT_DATA counts a process' data; not this platform")
    if num_bytes <= held:
        raise InputError(
            f"a memory limit of {num_bytes / 1e6:,.0f} MB: expected more than the {held / 1e6:,.0f} MB that Python and "
            "torch hold before any work. Raise the limit, or set OMP_NUM_THREADS=1, which holds less"
        )
    resource = cast(Any, importlib.import_module("resource"))
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


@contextmanager
def out_of_memory(what: str, chunk: int) -> Generator[None]:
    """Turn a refused allocation within the block into a `MemoryLimitError` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        raise MemoryLimitError(
            f"{what}: memory ran out. A smaller --chunk (now {chunk:,}) needs less with --method chunked; the other "
            "methods need memory for the whole sequence"
        ) from error


def measure_gradient(
    model: PerformerConfig, *, length: int, chunk: int, method: Method, threads: int | None = None
) -> Cost:
    """One gradient of a fresh model over `length` bytes, in a child process.

    Args:
        model: its shape.
        length: bytes of the sequence.
        chunk: for "slimgrad": bytes whose graph lives at once.
        method: "slimgrad", or "plain": the whole sequence in one graph, as ordinary backpropagation has it.
        threads: torch's, in the child; None: as in this process.
    """
    task = {
        "model": dataclasses.asdict(model), "length": length, "chunk": chunk, "method": method,
        "threads": threads or torch.get_num_threads(),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "slimgrad.bytelm.one_gradient"], input=json.dumps(task), capture_output=True, text=True
    )
    if done.returncode != 0:  # most likely: not enough memory for the plain way, and the system ended the process
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return Cost(peak_bytes=None, seconds=math.nan, note=f"the measuring process ended: {last[0]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def proc_status(name: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def max_resident_bytes() -> int | None:
    """The peak that getrusage knows, in bytes; None on Windows."""
    try:
        resource = cast(Any, importlib.import_module("resource"))
    except ImportError:  # Windows
        return None
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024
