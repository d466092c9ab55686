"""What a sweep runs, chunk by chunk, and what it tells of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from slimgrad.errors import SweepError
from slimgrad.states.base import Root
from slimgrad.sweep import tree
from slimgrad.sweep.cut import Span


@dataclass
class Piece:
    """One chunk, read.

    Attributes:
        span: which.
        inputs: the model's inputs.
        targets: what goes with them, where the head wants it.
        leaves: tensors of this chunk alone that take gradients; the program reads their `.grad`.
        read: checksums of what was read, by name: 0-d int64 tensors.
    """

    span: Span
    inputs: tree.Tree = None
    targets: tree.Tree = None
    leaves: Sequence[Tensor] = ()
    read: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass
class ChunkResult:
    """One chunk, run.

    Attributes:
        state: what the model returned.
        outputs: with the head: what takes cotangents in the reverse sweep. A loss of any shape, or the model's outputs.
        loss: the loss, for those who add it up or watch.
        metrics: further sums.
    """

    state: tree.Tree
    outputs: Sequence[Tensor] = ()
    loss: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Program(Protocol):
    """What a sweep runs."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def read(self, span: Span, *, head: bool) -> Piece:
        """The chunk, with what the head wants; called before its context is entered."""
        ...

    def chunk_context(self, position: int) -> AbstractContextManager[None]:
        """Within it the chunk that begins there runs, and runs the same each time: seeds, stand-ins."""
        ...

    def advance(self, piece: Piece, state: tree.Tree) -> ChunkResult:
        """The state after the chunk, without outputs."""
        ...

    def run(self, piece: Piece, state: tree.Tree) -> ChunkResult:
        """The state after the chunk, and its outputs."""
        ...

    def backward(self, span: Span, roots: Sequence[Root], leaves: Sequence[Tensor]) -> None:
        """Backpropagate from the roots into `leaves`, which belong to the chunk, and into the parameters."""
        ...

    def collect(self, piece: Piece, result: ChunkResult, phase: str) -> None:
        """Called once for each chunk and sweep, "forward" or "reverse" (after its backward pass)."""
        ...

    def forget(self) -> bool:
        """Drop the gradients that a failed backward pass left. False where those of other chunks are among them."""
        ...

    def draws(self) -> list[bytes]:
        """Where the random generators stand."""
        ...


@dataclass(frozen=True)
class Event:
    """What `on_chunk` hears after each chunk, or part of one.

    Attributes:
        phase: "forward", "again" (recomputed from a kept state) or "reverse".
        start: the chunk's first token.
        stop: the token after its last.
        length: of the sequence, in tokens.
        loss: the chunk's summed loss, over no normaliser; None where it was not computed.
        held_bytes: what the sweep holds now: kept states, live state, adjoint (not the gradients, not the graph).
        adjoint_norm: in the reverse sweep, the norm of the gradient with respect to the state before the chunk: how
            far back memory reaches.
    """

    phase: str
    start: int
    stop: int
    length: int
    loss: float | None
    held_bytes: int
    adjoint_norm: float | None


OnChunk = Callable[[Event], None]


class _Active(threading.local):
    """Whether this thread is within a chunk of some sweep."""

    inside = False


_active = _Active()


def refuse_nesting() -> None:
    """Raise where a sweep is about to begin inside another's chunk."""
    if _active.inside:
        raise SweepError(
            "a sweep was started inside a chunk of another; expected one at a time. Call slimgrad outside the model, "
            "or let the inner part be an ordinary forward pass"
        )


def is_inside_chunk() -> bool:
    """Whether this thread is within a chunk of some sweep."""
    return _active.inside


@contextmanager
def inside_chunk() -> Generator[None]:
    """Within it, this thread is within a chunk."""
    refuse_nesting()
    _active.inside = True
    try:
        yield
    finally:
        _active.inside = False
