"""Failed allocations, told apart from every other error.

Only an accelerator's allocator and Python itself raise a class of their own. The others raise RuntimeError and differ
in their words alone. Those of the CPU were found by running operations under RLIMIT_DATA and RLIMIT_AS (Linux, torch
2.13; the texts stand in `tests/sweep/test_allocation.py`), those of other systems and devices in bug reports.

oneDNN has three sentences. "could not create a primitive" (no room for the code that it generates) and "could not
execute a primitive" (no room to work in) meant that memory had run out wherever they came in those runs. Elsewhere they
have stood for faults (oneDNN 2.7, pytorch/pytorch#89104): whoever tries again with less has to give up at some size.
"could not create a primitive descriptor ..." says that there is no such operation, and no memory helps.

What nobody can catch: oneDNN 3.12 ends the process (SIGSEGV) where memory runs out as it generates the code of some
16-bit operations, which is when they first run at a shape.
"""

from __future__ import annotations

import errno
import re
from typing import Any

import torch

from slimgrad.errors import SlimgradError

_WORDS = re.compile(
    r"(can't|cannot|could not) allocate memory"  # torch's CPU allocator; ENOMEM in words: mapped files, shared memory
    r"|storage size calculation overflowed"  # more bytes than can be counted
    r"|not enough memory"  # torch's CPU allocator on Windows; MKL's Fourier transforms
    r"|bad_alloc"  # C++: small things, MKL's and LAPACK's workspaces
    r"|could not create a (memory|memory object|primitive)$|could not execute a primitive$"  # oneDNN
    r"|_ALLOC(ATION)?_FAILED|StatusAllocFailed"  # cuBLAS, cuDNN, cuSPARSE, cuFFT, their HIP namesakes, MKL; MIOpen
    r"|CUBLAS_STATUS_NOT_INITIALIZED"  # where torch made it a handle, there was no room for it
    r"|out[ _]of[ _]((device|host)[ _])?memory"  # CUDA, HIP and MPS outside of torch's allocator; Level Zero
    r"|invalid buffer size: [\d.]+ [kmgt]i?b",  # MPS: larger than any buffer can be
    re.IGNORECASE | re.MULTILINE,
)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether `error` says that memory could not be had: less work at once may then succeed.

    Errors of slimgrad itself (`MemoryLimitError`) are none: what they say has been judged already.
    """
    if isinstance(error, SlimgradError):
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def release(device: torch.device) -> None:
    """Give memory that torch keeps for later tensors of an accelerator back to it. On a CPU there is none to give."""
    if device.type == "cpu":
        return
    backend: Any = torch.get_device_module(device)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()
