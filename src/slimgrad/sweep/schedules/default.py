"""The schedule that is taken when the caller names none, and no budget decides."""

from __future__ import annotations

from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.binomial import Binomial
from slimgrad.sweep.schedules.keep import Rebuild

KEPT_STATES_LIMIT_BYTES = 256 << 20


def choose_schedule(plain_bytes: int, sum_bytes: int, num_chunks: int) -> tuple[Schedule, str]:
    """The schedule for a state, and the reason in words.

    `Rebuild` costs no extra compute and keeps only plain tensors, one copy per chunk. While these copies fit in
    `KEPT_STATES_LIMIT_BYTES` it is the best there is; beyond, `Binomial` holds as many states as fit.

    Args:
        plain_bytes: bytes of the state's plain tensors. One that never changes is counted as if it did: that shows only
            while the sequence runs.
        sum_bytes: bytes of its prefix sums as they are kept: see `accumulator.kept_bytes`.
        num_chunks: chunks in the sequence.
    """
    kept = plain_bytes * (num_chunks - 1)
    if kept <= KEPT_STATES_LIMIT_BYTES:
        return Rebuild(), (
            "Rebuild(): sums are rolled back; "
            + (f"{kept} bytes keep the plain tensors of every chunk" if kept else "nothing is kept")
        )
    slots = max(2, KEPT_STATES_LIMIT_BYTES // (plain_bytes + sum_bytes))
    schedule = Binomial(slots)
    again = schedule.num_advances(num_chunks) - (num_chunks - 1)
    return schedule, (
        f"Binomial({slots}): keeping the plain tensors of {num_chunks} chunks would take {kept} bytes, over "
        f"{KEPT_STATES_LIMIT_BYTES}; {again} chunks are advanced again instead"
    )
