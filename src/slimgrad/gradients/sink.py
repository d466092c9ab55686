"""What takes a parameter's gradient in place of a buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Sink = Callable[[Tensor], None]
"""Takes each chunk's gradient of one parameter, in its shape and dtype, on its device. Whatever is linear in it stays
exact; what it took stays taken when the call fails."""


@runtime_checkable
class SavedSink(Protocol):
    """A sink that a `Segment` can save."""

    def __call__(self, gradient: Tensor, /) -> None:
        """Take one chunk's gradient."""
        ...

    def state(self) -> Any:
        """What it has come to: tensors, numbers and the like, in dicts and lists."""
        ...

    def load(self, state: Any, /) -> None:
        """Go on from there."""
        ...
