"""Whose turn it is: sweeps in several threads wait for each other, chunk by chunk.

A process has one random generator for its CPU, and one for each device; a chunk seeds them and holds the turn until it
is over.

On an accelerator autograd goes back in a thread of its own, one for each device, and `loss.backward()` runs its whole
reverse sweep there. A chunk of another thread, in its backward pass, waits for that very thread: neither would end, if
that one waited for the turn. So the turn is lent for the length of a backward pass, to the thread that goes through it
and to no other. What draws in a backward pass is activation checkpointing, which sets and puts back the generators
around what it runs again; in that one thread it cannot run beside a chunk of the borrower's. Where a backward pass is
partly on the CPU it could, in the lender's thread: then the turn is not lent, and who waits in autograd's is refused.

A model that differentiates within its own step waits for autograd's thread without lending: on an accelerator it may
not be swept beside a `loss.backward()` in another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slimgrad.errors import SweepError


@dataclass(eq=False)
class _Holder:
    """One who has taken the turn."""

    thread: int
    goes_back_on: torch.device | None = None  # for as long as a backward pass is under way there
    lends: bool = False


class _Here(threading.local):
    """Of which device this thread of autograd's is, while it runs a reverse sweep."""

    device: torch.device | None = None


_here = _Here()


class Turn:
    """A lock that its holder may take again, and lend."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: list[_Holder] = []  # the last one has it; those before are the same thread, or have lent it

    @contextmanager
    def taken(self) -> Generator[None]:
        """Within the block it is this thread's turn. Waits for it.

        Raises:
            SweepError: this is autograd's thread, for which another thread's chunk waits, and it does not lend.
        """
        mine = _Holder(threading.get_ident())
        with self._changed:
            self._changed.wait_for(self._is_free)
            self._holders.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._holders.remove(mine)
                self._changed.notify_all()

    def _is_free(self) -> bool:
        if not self._holders or self._holders[-1].thread == threading.get_ident():
            return True
        holder = self._holders[-1]
        if holder.goes_back_on is None or holder.goes_back_on != _here.device:
            return False
        if not holder.lends:
            raise SweepError(
                f"another thread's sweep is in a backward pass on {_here.device} and on the CPU, and waits for the "
                "thread in which this one runs; expected models that are wholly on the device. Call slimgrad.backward "
                "in place of loss.backward(), or run one of them after the other"
            )
        return True

    @contextmanager
    def lent(self, device: torch.device, *, wholly: bool) -> Generator[None]:
        """Around a backward pass of the holder's: within the block autograd's thread of the device may take the turn.

        Args:
            device: where the backward pass is.
            wholly: no part of it is on the CPU. Else the turn is not lent.
        """
        if not has_own_thread(device):
            yield
            return
        with self._changed:
            holder = self._holders[-1]
            holder.goes_back_on, holder.lends = device, wholly
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                holder.goes_back_on = None
                self._changed.wait_for(lambda: self._holders[-1] is holder)


turn = Turn()


@contextmanager
def in_autograds_thread(device: torch.device) -> Generator[None]:
    """Within the block this is autograd's thread of `device`, and may borrow the turn. On a CPU it has none."""
    before = _here.device
    _here.device = device if has_own_thread(device) else None
    try:
        yield
    finally:
        _here.device = before


def has_own_thread(device: torch.device) -> bool:
    """Whether autograd goes back on `device` in a thread of its own."""
    return device.type != "cpu"
