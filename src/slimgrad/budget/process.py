"""How much memory this process holds, has held, and may hold.

| system | the peak is | begins anew with `reset_peak` |
|---|---|---|
| Linux | `VmHWM` of /proc/self/status | yes, where /proc/self/clear_refs allows it |
| macOS and other Unix | `ru_maxrss` of getrusage (bytes on macOS, KiB elsewhere) | no |
| Windows | not measured | |

It is what the kernel calls resident (`VmRSS`): every page in memory, with weights, the code of libraries, and files
that were mapped. Nothing is taken off, since of pages of files Linux knows no peak. So slimgrad reads corpora and kept
states, and maps neither. A file that the caller maps (`np.memmap`, `torch.from_file`) counts with the pages that are
in memory, which the kernel takes back when it is short of it.

On Linux `ru_maxrss` would mislead: a child starts with the peak of the process that it was forked from.

A limit (`limit_memory`) is the kernel's: RLIMIT_DATA, which since Linux 4.7 counts every private page that may be
written to, used or not: heap, tensors, the stacks of threads. What would go beyond it is refused, and raises here.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path
from typing import Any, cast

from slimgrad.errors import InputError

PROC = Path("/proc/self")


def resident_bytes() -> int | None:
    """Memory that this process holds now (on Unix without /proc: its peak so far); None where nobody tells."""
    return proc_status("VmRSS") or max_resident_bytes()


def peak_resident_bytes() -> int | None:
    """The most memory that this process held; None where the platform does not tell."""
    return proc_status("VmHWM") or max_resident_bytes()


def reset_peak() -> bool:
    """Have the peak begin anew from what is held now; whether what `peak_resident_bytes` then says is of use."""
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        return proc_status("VmHWM") is None
    return True


class _Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2 tells, in bytes; see its manual page."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def malloc_bytes() -> int | None:
    """What malloc has given out and not got back: tensors, and the nodes of autograd's graphs. None: not glibc's."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if tell is None:
        return None
    tell.restype = _Mallinfo2
    told = tell()
    return told.uordblks + told.hblkhd


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
