"""What the first sweep saw, for the second to compare: bits of states and of losses."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from slimgrad.errors import LossMismatchError
from slimgrad.sweep.accumulator import checksum

_FEW_UNITS = 4 * torch.finfo(torch.float32).eps  # four units in the last place of a float32


def fetch(numbers: Sequence[Tensor | int | None]) -> list[int | None]:
    """0-d integer tensors as Python's, with one synchronisation for each device; others as they are."""
    found: list[int | None] = [None if isinstance(x, Tensor) else x for x in numbers]
    for device in {x.device for x in numbers if isinstance(x, Tensor)}:
        places = [i for i, x in enumerate(numbers) if isinstance(x, Tensor) and x.device == device]
        values = torch.stack([x for x in numbers if isinstance(x, Tensor) and x.device == device]).tolist()
        for place, value in zip(places, values, strict=True):
            found[place] = value
    return found


class LossRecord:
    """Each chunk's loss as the first sweep computed it: 16 bytes a chunk."""

    def __init__(self) -> None:
        self._bits, self._sums = array("q"), array("d")
        self._warned = False

    def record(self, chunk: int, loss: Tensor) -> None:
        """Note the loss of the next chunk."""
        assert chunk == len(self._bits)
        self._bits.append(int(checksum(loss)))
        self._sums.append(0.0 if loss.device.type == "cpu" else float(loss.detach().float().sum()))

    def check(self, chunk: int, loss: Tensor) -> None:
        """Compare, where the first sweep computed it; NaN equals itself.

        On other devices than the CPU sums over atomics may differ in the last places: where the loss alone does, and by
        so little, that is a warning.
        """
        if chunk >= len(self._bits) or int(checksum(loss)) == self._bits[chunk]:
            return
        before = self._sums[chunk]
        if loss.device.type != "cpu":
            now = float(loss.detach().float().sum())
            if abs(now - before) <= _FEW_UNITS * max(abs(now), abs(before)):
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"the loss of chunk {chunk} differed in its last bits between the two sweeps ({before!r}, "
                        f"{now!r}): a kernel is not deterministic. Its gradient is that of the second value; for one "
                        "value use torch.use_deterministic_algorithms",
                        stacklevel=2,
                    )
                return
        raise LossMismatchError(
            f"the loss of chunk {chunk} came out differently in the reverse sweep than when it was returned, so its "
            "gradient would belong to another loss. Expected the same computation twice; look for something that "
            "changed between the loss and its backward (a mode, a weight through .data, an attribute of a module or of "
            "loss_fn), a random draw from another generator than torch's, or a nondeterministic kernel"
        )
