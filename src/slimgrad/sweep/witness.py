"""What the first sweep saw, for the second to compare: bits of states, of losses, of what was read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import ConsumedError, LossMismatchError
from slimgrad.states.checksum import checksum
from slimgrad.sweep.cut import Span
from slimgrad.sweep.record import Record

_FEW_UNITS = 4 * torch.finfo(torch.float32).eps  # four units in the last place of a float32


def fetch(numbers: Sequence[Tensor | int | None]) -> list[Any]:
    """0-d integer tensors as Python's, with one synchronisation for each device; others as they are."""
    found: list[Any] = [None if isinstance(x, Tensor) else x for x in numbers]
    for device in {x.device for x in numbers if isinstance(x, Tensor)}:
        places = [i for i, x in enumerate(numbers) if isinstance(x, Tensor) and x.device == device]
        values = torch.stack([x for x in numbers if isinstance(x, Tensor) and x.device == device]).tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found


class Witness:
    """Numbers noted by name and position when they are first seen, and compared from then on.

    Memory: 16 bytes for each name and chunk.
    """

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._warned = False

    def agrees(self, name: str, position: int, number: int) -> bool:
        """Whether this is what was seen there before, if anything was."""
        record = self._records.setdefault(name, Record())
        known = record.at(position)
        if known is None:
            record.put(position, number)
        return known is None or known == number

    def forget_after(self, position: int) -> None:
        """Drop what was noted of a chunk that failed; what is said of a chunk is noted at its end."""
        for record in self._records.values():
            record.forget_after(position)

    def compare_read(self, name: str, span: Span, number: int) -> None:
        """Raise if what was read for a chunk is not what was read for it before."""
        if not self.agrees(name, span.stop, number):
            raise ConsumedError(
                f"{name}, {span}: other values were read than in the first sweep, so the "
                "gradient would belong to neither. Expected the same each time: leave tensors and mapped files alone "
                "until the gradient is done, and let a reader compute or read a span to the same bits whenever it is "
                "asked"
            )

    def of_loss(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What is fetched of a chunk's loss (or outputs): a checksum; of one number on an accelerator also that."""
        if not outputs:
            return []
        bits = torch.zeros((), dtype=torch.int64, device=outputs[0].device)
        for number, x in enumerate(outputs):
            bits += checksum(x) * (2 * number + 1)
        is_one = len(outputs) == 1 and outputs[0].dim() == 0 and outputs[0].device.type != "cpu"
        return [bits, outputs[0].detach().float().view(torch.int32).to(torch.int64)] if is_one else [bits]

    def compare_loss(self, span: Span, numbers: Sequence[int]) -> None:
        """Raise if a loss (or the outputs) is not what it was in the first sweep; NaN equals itself.

        On other devices than the CPU sums over atomics may differ in the last places: where one number does, and by so
        little, that is a warning.

        Args:
            span: the chunk.
            numbers: `of_loss`, fetched.
        """
        if not numbers or self.agrees("loss", span.stop, numbers[0]):
            for number in numbers[1:]:
                self.agrees("value of the loss", span.stop, number)
            return
        known = self._records["value of the loss"].at(span.stop) if len(numbers) > 1 else None
        if known is not None:
            before, now = (
                float(torch.tensor(x, dtype=torch.int32, device="cpu").view(torch.float32)) for x in (known, numbers[1])
            )
            if abs(now - before) <= _FEW_UNITS * max(abs(now), abs(before)):
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"the loss of {span} differed in its last bits between the two "
                        f"sweeps ({before!r}, {now!r}): a kernel is not deterministic. Its gradient is that of the "
                        "second value; for one value use torch.use_deterministic_algorithms",
                        stacklevel=2,
                    )
                return
        raise LossMismatchError(
            f"the loss (or outputs) of {span} came out differently in the reverse sweep than when it "
            "was returned, so its gradient would belong to another loss. Expected the same computation twice; look for "
            "something that changed between the loss and its backward (a mode, a weight through .data, an attribute of "
            "a module or of loss_fn), a random draw from another generator than torch's, or a nondeterministic kernel"
        )

    def state(self) -> dict[str, Any]:
        """Every record."""
        return {name: record.state() for name, record in self._records.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._records = {}
        for name, saved in state.items():
            self._records[name] = Record()
            self._records[name].load_state(saved)
