"""What a budget buys: a plan, with its account of bytes and its reasons. A value, to be saved and used again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimgrad.budget.size import in_megabytes
from slimgrad.errors import InputError
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.names import parse_schedule, schedule_as_text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one gradient is computed within a budget.

    Attributes:
        chunk: tokens whose graph lives at once.
        schedule: how states are found again; with its tape, and where kept states lie.
        memory: the budget: bytes that the process may hold, weights included.
        account: predicted bytes by what they are for. Their sum is the predicted peak.
        seconds: predicted for one gradient over `length` tokens, on the machine where chunks were timed.
        length: tokens of the sequence (of all, where there are several) that it was made for.
        reasons: in words, one for each choice.
        malloc: what it does with large blocks, "default", "returned" or "kept" (on CUDA ""); a command sets it so.
    """

    chunk: int
    schedule: Schedule
    memory: int
    account: Mapping[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0
    length: int = 0
    reasons: tuple[str, ...] = ()
    malloc: str = ""

    @property
    def peak(self) -> int:
        """The most bytes that the process is predicted to hold."""
        return sum(self.account.values())

    def __str__(self) -> str:
        how = f"chunk {self.chunk:,}, {schedule_as_text(self.schedule)}"
        lines = [f"{how}: {self.seconds:.3g} s, at most {in_megabytes(self.peak)} of {in_megabytes(self.memory)}"]
        lines += [f"  {in_megabytes(num_bytes):>12}  {name}" for name, num_bytes in self.account.items() if num_bytes]
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {name: getattr(self, name) for name in ("chunk", "memory", "seconds", "length", "malloc")}
        return plain | {
            "schedule": schedule_as_text(self.schedule), "account": dict(self.account), "reasons": list(self.reasons),
        }  # fmt: skip

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> Plan:
        """What `to_dict` gave.

        Raises:
            InputError: it is no plan.
        """
        try:
            values: dict[str, Any] = dict(saved)
            values["schedule"] = parse_schedule(values["schedule"])
            values["reasons"] = tuple(values["reasons"])
            assert values["schedule"] is not None
            return Plan(**values)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise InputError(f"expected a plan as Plan.to_dict gives it, got {saved!r:.200}") from error
