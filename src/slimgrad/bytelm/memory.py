"""Running out of memory, and how much one gradient of a Performer takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from slimgrad.budget.measure import call_in_child, measure_peak
from slimgrad.bytelm.config import Method
from slimgrad.bytelm.gradient import add_gradient
from slimgrad.data import Batch
from slimgrad.errors import MemoryLimitError, RunError
from slimgrad.models.performer import Performer
from slimgrad.models.shapes import PerformerConfig
from slimgrad.sweep.allocation import is_allocation_failure

_WARM_UP_BYTES = 64


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
        chunk: for "chunked": bytes whose graph lives at once.
        method: as `gradient.add_gradient` has it.
        threads: torch's, in the child; None: as in this process.
    """
    task = {
        "model": dataclasses.asdict(model), "length": length, "chunk": chunk, "method": method,
        "threads": threads or torch.get_num_threads(),
    }  # fmt: skip
    try:
        return Cost(**call_in_child(f"{__name__}:one_gradient", task))
    except RunError as error:  # most likely: not enough memory for the plain way, and the system ended the process
        return Cost(peak_bytes=None, seconds=math.nan, note=f"the measuring process ended: {error}")


def one_gradient(
    *, model: dict[str, Any], length: int, method: Method, chunk: int, device: str = "cpu", threads: int | None = None
) -> dict[str, Any]:
    """Peak bytes above parameters and gradients, and seconds, of one gradient of batch 1 over random bytes; see `Cost`.

    For a process of its own. On the CPU resident bytes, on CUDA those that torch's allocator gave out.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    performer = Performer(PerformerConfig(**model)).to(device)
    few = min(_WARM_UP_BYTES, length)
    add_over_random_bytes(performer, few, method, few // 2)  # loads what torch loads lazily, and makes the gradients
    # the gradients' bytes stay within what is held before: the pass makes them anew
    measured = measure_peak(lambda: add_over_random_bytes(performer, length, method, chunk), device)
    return measured._asdict() | {"note": "" if measured.peak_bytes is not None else "not measured on this platform"}


def add_over_random_bytes(model: Performer, length: int, method: Method, chunk: int) -> None:
    """One gradient in the place of the one before."""
    model.zero_grad(set_to_none=True)
    tokens = torch.randint(256, (1, length + 1), dtype=torch.uint8)
    batch = Batch(tokens[:, :-1], tokens[:, 1:].to(torch.int16))
    add_gradient(model, batch, method=method, chunk=chunk, schedule=None, normalizer=length)
