"""How a sweep carries each leaf of the state from chunk to chunk, forward and back.

One carrier per leaf, for the length of one run. A chunk is one round of

    bind -> (the model runs) -> take -> [backward] -> settle

`bind` hands the model its leaf, `take` receives the one it returned, and in the reverse sweep names the roots through
which the adjoint (the gradient of the state after the chunk) enters the chunk's graph; `settle` reads off the adjoint
of the state before the chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from slimgrad.errors import ModelError, StateMismatchError
from slimgrad.sweep.store import Store

Token = TypeVar("Token")


class Mode(Enum):
    """What a chunk is run for."""

    FORWARD = auto()  # the first time: states only, and bits are recorded
    AGAIN = auto()  # recomputed from a kept state: bits are checked
    FROM_BEFORE = auto()  # with a graph, from the state before the chunk
    ROLL_BACK = auto()  # with a graph, from the state after the chunk


class Root(NamedTuple):
    """A tensor of the chunk's graph (or its edge, where it may be written to since), and the cotangent at it."""

    tensor: Tensor | GradientEdge
    cotangent: Tensor


class Carrier(ABC, Generic[Token]):
    """One leaf of the state. `index` says which, `name` says it to people."""

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.chunk = 0
        self.mode = Mode.FORWARD
        self.peeking = False  # the chunk will be run a second time from the same live state
        self.in_backward = False  # a call of the model then is activation checkpointing, running the chunk again

    @property
    def reverses(self) -> bool:
        """Whether the chunk is run for its gradient."""
        return self.mode in (Mode.FROM_BEFORE, Mode.ROLL_BACK)

    def require_grad_mode(self, call: str) -> None:
        """Raise where a chunk that is run for its gradient is run without one."""
        if self.reverses and not torch.is_grad_enabled():
            raise ModelError(
                f"state {self.name}: {call} was called without gradients in the reverse sweep; expected them on. "
                "Remove torch.no_grad, and use torch.utils.checkpoint with use_reentrant=False"
            )

    def bind(self, mode: Mode, chunk: int) -> Any:
        """The leaf to hand to the model."""
        self.mode, self.chunk, self.in_backward = mode, chunk, False
        return self._bind()

    @abstractmethod
    def _bind(self) -> Any: ...

    @abstractmethod
    def take(self, returned: Any) -> None:
        """Receive the leaf that the model returned."""

    def roots(self) -> list[Root]:
        """Where the adjoint enters the chunk's graph."""
        return []

    def sources(self) -> list[Tensor]:
        """The leaves of the chunk's graph that stand for the state before it."""
        return []

    def settle(self) -> None:
        """The chunk is over: forget its graph. In the reverse sweep the adjoint is now that of the state before it."""

    @abstractmethod
    def keep(self, store: Store, *, rolls_back: bool) -> Token | None:
        """Keep what is needed to stand here again; None if nothing is."""

    @abstractmethod
    def load(self, store: Store, token: Token) -> None:
        """Stand where `token` was kept."""

    def drop(self, store: Store, token: Token) -> None:
        """Forget `token`."""

    def checksum(self) -> Tensor | int | None:
        """64 bits of the state after chunk `checked_chunk`; None where the carrier compares whole rows itself."""
        return None

    @property
    def checked_chunk(self) -> int:
        """Which chunk's end state `checksum` speaks of; -1 is the initial state."""
        return self.chunk

    @abstractmethod
    def final(self) -> Any:
        """The live leaf, free of any sweep."""

    @abstractmethod
    def adjoint(self) -> Tensor | None:
        """The gradient of the live state; None stands for zeros."""

    @abstractmethod
    def set_adjoint(self, gradient: Tensor) -> None:
        """Take the gradient of the final state from whoever holds the rest of the sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes held for this leaf beside what the store keeps."""
        return 0

    def wrong(self, returned: Any) -> ModelError:
        """The model returned something that is not this state, moved on once."""
        return ModelError(
            f"state {self.name}: expected the object that advance/append returned, or the one the model was given "
            f"(untouched); got {returned!r}. Return exactly one of them from forward and advance"
        )


def mismatch(name: str, chunk: int) -> StateMismatchError:
    """The bits of a state came out differently the second time."""
    return StateMismatchError(
        f"state {name}, chunk {chunk}: rebuilt with other bits than in the forward sweep, so the gradient would not be "
        "exact. Expected the same computation twice; look for a random draw from another generator (Python's, "
        "NumPy's), a nondeterministic kernel (torch.use_deterministic_algorithms), `advance` computing otherwise than "
        "`forward`, or a weight, a buffer or the number of threads changed in between"
    )
