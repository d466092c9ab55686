"""The two sweeps over one sequence, in two calls: everything else stands on them.

    run = Run(program, initial_state, schedule=Rebuild(), ...)
    forward = run.forward()                      # states only (or losses too)
    gradient = run.reverse(loss_grad)            # chunk by chunk, last first; gives the initial state's gradient

A `Program` is what a sweep runs: a chunk by its number. It knows the model, the inputs and the loss; the sweep knows
none of them. Between the two calls a run holds the states its schedule keeps, and nothing of any chunk.

Algorithm 1 of "Sub-Linear Memory: How to Make Performers SLiM" (NeurIPS 2021), with the schedule and the kinds of state
made parameters. Cost over plain backpropagation: `schedule.num_advances` chunks forward. Memory: one chunk's
graph, the kept states, one adjoint, the gathered gradients, and 8 bytes per chunk and state for the checksums.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from slimgrad.errors import ConsumedError, ModelError, SweepError
from slimgrad.sweep import tree
from slimgrad.sweep.carriers import Carrier, Mode, Root, carrier_for, mismatch
from slimgrad.sweep.gather import refuse_escaped
from slimgrad.sweep.schedule import Action, Kind, Schedule
from slimgrad.sweep.state import Growing, PrefixSum
from slimgrad.sweep.store import Store
from slimgrad.sweep.witness import LossRecord, fetch


@dataclass
class ChunkResult:
    """One chunk, run with its head.

    `loss` may have any shape; its cotangent comes from `loss_grad`. `leaves` are tensors of this chunk alone that take
    gradients (its inputs); the program reads their `.grad` in `collect`.
    """

    loss: Tensor
    state: tree.Tree
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    leaves: Sequence[Tensor] = ()


class Program(Protocol):
    """What a sweep runs."""

    @property
    def num_chunks(self) -> int:
        """How many chunks the sequence has, at least 1."""
        ...

    def chunk_context(self, chunk: int) -> AbstractContextManager[None]:
        """Within it, chunk `chunk` runs, and runs the same each time: seeds, stand-ins. -1: initial state."""
        ...

    def advance(self, chunk: int, state: tree.Tree) -> tree.Tree:
        """The state after the chunk."""
        ...

    def run(self, chunk: int, state: tree.Tree) -> ChunkResult:
        """The loss of the chunk and the state after it."""
        ...

    def backward(self, chunk: int, roots: Sequence[Root], leaves: Sequence[Tensor]) -> None:
        """Backpropagate from the roots into `leaves`, which belong to the chunk, and into the parameters."""
        ...

    def collect(self, chunk: int, result: ChunkResult, phase: str) -> None:
        """Called once per chunk whose loss was computed, "forward" or "reverse" (after its backward pass)."""
        ...


@dataclass(frozen=True)
class Event:
    """What `on_chunk` hears after each chunk.

    Attributes:
        phase: "forward", "again" (recomputed from a kept state) or "reverse".
        chunk: the chunk's number, from 0.
        num_chunks: of the sequence.
        loss: the chunk's summed loss, where it was computed.
        held_bytes: what the sweep holds now: kept states, live state, adjoint (not the gradients, not the graph).
        adjoint_norm: in the reverse sweep, the norm of the gradient with respect to the state before the chunk: how
            far back memory reaches.
    """

    phase: str
    chunk: int
    num_chunks: int
    loss: float | None
    held_bytes: int
    adjoint_norm: float | None


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
def _inside_chunk() -> Generator[None]:
    refuse_nesting()
    _active.inside = True
    try:
        yield
    finally:
        _active.inside = False


class Run:
    """One sequence, swept forward once and back once.

    Args:
        program: the chunks.
        initial_state: the state before the first chunk.
        schedule: how the states before each chunk are found again.
        verify_bits: compare every rebuilt state with the forward sweep's, bit for bit, by checksum.
        on_chunk: called with an `Event` after each chunk.
    """

    def __init__(
        self,
        program: Program,
        initial_state: tree.Tree,
        *,
        schedule: Schedule,
        verify_bits: bool = True,
        on_chunk: Callable[[Event], None] | None = None,
    ) -> None:
        refuse_nesting()
        self._program = program
        self._num_chunks = program.num_chunks
        self._on_chunk = on_chunk
        self._rolls_back = schedule.rolls_back
        self._plan = schedule.plan(self._num_chunks)
        self._first_reverse: Action | None = None
        leaves, self._spec = tree.flatten(initial_state)
        self._skeleton = tree.skeleton(self._spec)
        self._carriers: list[Carrier[Any]] = [
            carrier_for(leaf, index, name, rolls_back=self._rolls_back, expected_growth=self._num_chunks)
            for index, (leaf, name) in enumerate(zip(leaves, tree.paths(initial_state), strict=True))
        ]
        self._store = Store(schedule.store, schedule.num_slots(self._num_chunks))
        self._slots: dict[int, list[Any]] = {}
        self._verify_bits = verify_bits
        self._checksums = [array("q") for _ in self._carriers] if verify_bits else []
        self._final_state: tree.Tree = None
        self._final_gradient: Sequence[Tensor | None] = ()
        self._losses = LossRecord()
        self._phase = "new"

    @property
    def held_bytes(self) -> int:
        """Bytes of kept states, live state and adjoint."""
        return self._store.nbytes + sum(carrier.nbytes for carrier in self._carriers)

    @property
    def final_state(self) -> tree.Tree:
        """The state after the last chunk, without a graph: known once the last chunk ran."""
        return self._final_state

    def forward(self, *, to_end: bool = False, losses: bool = False) -> tree.Tree:
        """Sweep forward, keeping the states that the schedule asks for.

        Args:
            to_end: run the last chunk too, and return the state after it. Without, the reverse sweep runs it first and
                nothing is computed twice.
            losses: run every chunk with its head, so that the program collects its losses. Implies `to_end`.

        Returns:
            The final state with `to_end`, else None.
        """
        self._move_to("new", "swept")
        try:
            with torch.no_grad():
                self._record(-1)
                for action in self._plan:
                    if action.kind is Kind.REVERSE:
                        self._first_reverse = action
                        break
                    self._carry_out(action, losses=losses)
                if to_end or losses:
                    self._peek(losses=losses)
        except BaseException:
            self._close()
            raise
        return self._final_state

    def reverse(
        self, loss_grad: Tensor | Callable[[int], Tensor | None], final_state_grad: tree.Tree | None = None
    ) -> tree.Tree:
        """Sweep back, last chunk first, gathering gradients in the program's parameters.

        Args:
            loss_grad: the cotangent of every chunk's loss, or a function from the chunk's number to it (None: zero).
            final_state_grad: the gradient of the final state: the state's tree with a tensor (or None) for each leaf.

        Returns:
            The gradient of the initial state, likewise a tree of tensors; None where no gradient came.
        """
        self._move_to("swept", "reversed")
        try:
            self._final_gradient = self._match_gradient(final_state_grad)
            cotangent = loss_grad if callable(loss_grad) else _constant(loss_grad)
            assert self._first_reverse is not None
            self._reverse_chunk(self._first_reverse.chunk, Mode.FROM_BEFORE, cotangent)
            mode = Mode.ROLL_BACK if self._rolls_back else Mode.FROM_BEFORE
            for action in self._plan:
                if action.kind is Kind.REVERSE:
                    self._reverse_chunk(action.chunk, mode, cotangent)
                else:
                    with torch.no_grad():
                        self._carry_out(action, losses=False)
            return tree.unflatten([carrier.adjoint() for carrier in self._carriers], self._spec)
        finally:
            self._close()

    def _carry_out(self, action: Action, *, losses: bool) -> None:
        if action.kind is Kind.STORE:
            kept = [carrier.keep(self._store, rolls_back=self._rolls_back) for carrier in self._carriers]
            if any(token is not None for token in kept):
                self._slots[action.slot] = kept
        elif action.kind is Kind.ADVANCE:
            self._advance_chunk(action.chunk, losses=losses and self._phase == "swept")
        elif action.slot in self._slots:
            kept = self._slots[action.slot]
            for carrier, token in zip(self._carriers, kept, strict=True):
                if token is not None:
                    if action.kind is Kind.LOAD:
                        carrier.load(self._store, token)
                    else:
                        carrier.drop(self._store, token)
            if action.kind is Kind.FREE:
                del self._slots[action.slot]

    def _advance_chunk(self, chunk: int, *, losses: bool) -> None:
        mode = Mode.FORWARD if self._phase == "swept" else Mode.AGAIN
        result = None
        # Gradients are on as in the reverse sweep, though nobody asks for them here: torch chooses some kernels by it
        # (matmul folds or batches, recurrent layers have a kernel for inference), and other kernels give other bits.
        with _inside_chunk(), self._program.chunk_context(chunk), torch.set_grad_enabled(self._verify_bits):
            state = self._bind(mode, chunk)
            if losses:
                with self._naming_states(chunk):
                    result = self._program.run(chunk, state)
                self._take(result.state)
                if self._verify_bits:
                    self._losses.record(chunk, result.loss)
            else:
                with self._naming_states(chunk):
                    following = self._program.advance(chunk, state)
                self._take(following)
        self._settle([] if result is None else result.leaves)
        if mode is Mode.FORWARD:
            self._record(chunk)
        else:
            self._check()
        if result is not None:
            self._program.collect(chunk, result, "forward")
        self._tell("forward" if mode is Mode.FORWARD else "again", chunk, result)

    def _peek(self, *, losses: bool) -> None:
        """Run the last chunk for its losses and end state, then stand before it again."""
        last = self._num_chunks - 1
        aside = Store("device", 1)
        tokens = [carrier.keep(aside, rolls_back=False) for carrier in self._carriers]
        for carrier in self._carriers:
            carrier.peeking = True
        self._advance_chunk(last, losses=losses)
        self._final_state = self._collect_final()
        for carrier, token in zip(self._carriers, tokens, strict=True):
            carrier.peeking = False
            carrier.load(aside, token)
            carrier.drop(aside, token)

    def _reverse_chunk(self, chunk: int, mode: Mode, cotangent: Callable[[int], Tensor | None]) -> None:
        with _inside_chunk(), self._program.chunk_context(chunk):
            with torch.enable_grad(), self._naming_states(chunk):
                result = self._program.run(chunk, self._bind(mode, chunk))
            self._take(result.state)
            self._check()
            self._losses.check(chunk, result.loss)
            if chunk == self._num_chunks - 1:
                self._final_state = self._collect_final()
                self._enter_final_gradient()
            self._backward(chunk, result, cotangent(chunk))
        self._settle(result.leaves)
        self._program.collect(chunk, result, "reverse")
        self._tell("reverse", chunk, result)

    def _backward(self, chunk: int, result: ChunkResult, loss_grad: Tensor | None) -> None:
        """Backpropagate through one chunk: from its loss, and from its end state with the adjoint."""
        roots = [root for carrier in self._carriers for root in carrier.roots()]
        if loss_grad is not None and result.loss.requires_grad:
            roots.append(Root(result.loss, loss_grad.to(result.loss.dtype).expand_as(result.loss)))
        if not roots:
            return
        for carrier in self._carriers:
            carrier.in_backward = True
        sources = [source for carrier in self._carriers for source in carrier.sources()]
        self._program.backward(chunk, roots, [*result.leaves, *sources])

    def _settle(self, leaves: Sequence[Tensor]) -> None:
        """The chunk is over: whatever still holds on to its graph may not go back through it."""
        for leaf in (*leaves, *(source for carrier in self._carriers for source in carrier.sources())):
            leaf.register_hook(refuse_escaped)
        for carrier in self._carriers:
            carrier.settle()
            carrier.in_backward = False

    @contextmanager
    def _naming_states(self, chunk: int) -> Generator[None]:
        """Say what torch means where it refuses to write to a leaf."""
        try:
            yield
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            names = ", ".join(carrier.name for carrier in self._carriers)
            raise ModelError(
                f"a state ({names}), an input or a parameter was modified in place in chunk {chunk}; expected a new "
                "tensor (the old one is still needed on the way back). Use out-of-place operations, or clone the state "
                "first: state = state.clone()"
            ) from error

    def _bind(self, mode: Mode, chunk: int) -> tree.Tree:
        return tree.unflatten([carrier.bind(mode, chunk) for carrier in self._carriers], self._spec)

    def _take(self, state: tree.Tree) -> None:
        try:
            leaves = tree.flatten_like(state, self._skeleton)
        except ValueError as error:
            raise ModelError(
                f"the model returned a state of another structure than it was given: {error}. "
                "forward and advance must return the state with the same keys, in the same containers"
            ) from None
        for carrier, leaf in zip(self._carriers, leaves, strict=True):
            carrier.take(leaf)

    def _collect_final(self) -> tree.Tree:
        return tree.unflatten([carrier.final() for carrier in self._carriers], self._spec)

    def _match_gradient(self, gradient: tree.Tree | None) -> Sequence[Tensor | None]:
        if gradient is None:
            return [None] * len(self._carriers)
        return match_gradient(gradient, self._spec, [carrier.name for carrier in self._carriers])

    def _enter_final_gradient(self) -> None:
        """The adjoint begins as the final state's gradient, once the final state and its shapes are known."""
        leaves = tree.leaves(self._final_state)
        for carrier, gradient, leaf in zip(self._carriers, self._final_gradient, leaves, strict=True):
            if gradient is not None:
                expected = leaf.value.shape if isinstance(leaf, PrefixSum | Growing) else getattr(leaf, "shape", None)
                if expected is not None and gradient.shape != expected:
                    raise SweepError(
                        f"the gradient of state {carrier.name}: expected the final state's shape {list(expected)}, "
                        f"got {list(gradient.shape)}"
                    )
                carrier.set_adjoint(gradient)

    def _record(self, chunk: int) -> None:
        """Note the bits of the live state after `chunk` (-1: the initial state)."""
        if not self._checksums:
            return
        for log, bits in zip(self._checksums, fetch([c.checksum() for c in self._carriers]), strict=True):
            if bits is not None:
                assert len(log) == chunk + 1
                log.append(bits)

    def _check(self) -> None:
        """Compare the bits of each rebuilt state with those noted, where the forward sweep came so far."""
        known = [
            (log[carrier.checked_chunk + 1], carrier)
            for log, carrier in zip(self._checksums, self._carriers, strict=False)
            if carrier.checked_chunk + 1 < len(log)
        ]
        for (noted, carrier), bits in zip(known, fetch([c.checksum() for _, c in known]), strict=True):
            if bits is not None and bits != noted:
                raise mismatch(carrier.name, carrier.chunk)

    def _tell(self, phase: str, chunk: int, result: ChunkResult | None) -> None:
        if self._on_chunk is None:
            return
        norm = None
        if phase == "reverse":
            adjoints = [a for a in (carrier.adjoint() for carrier in self._carriers) if a is not None]
            norm = float(torch.stack([a.abs().float().norm() for a in adjoints]).norm()) if adjoints else 0.0
        loss = None if result is None else float(result.loss.detach().sum())
        self._on_chunk(Event(phase, chunk, self._num_chunks, loss, self.held_bytes, norm))

    def _move_to(self, expected: str, phase: str) -> None:
        if self._phase != expected:
            raise ConsumedError(
                f"this run is {self._phase!r}, expected {expected!r}: a run goes forward once and back once. "
                "Start a new one (call slimgrad again) for another gradient"
            )
        self._phase = phase

    def _close(self) -> None:
        self._phase = "closed"
        self._slots.clear()
        self._store.close()


def _constant(cotangent: Tensor) -> Callable[[int], Tensor | None]:
    return lambda chunk: cotangent


def match_gradient(gradient: tree.Tree, spec: tree.TreeSpec, names: Sequence[str]) -> list[Tensor | None]:
    """The leaves of a state's gradient, in the state's order.

    State objects in `gradient` are refused: a gradient holds a tensor, or None, where the state holds an object.
    """
    leaves, got = tree.flatten(gradient)
    if got != spec:
        raise SweepError(f"a state's gradient has another structure than the state; expected {spec}, got {got}")
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, PrefixSum | Growing) or not (leaf is None or isinstance(leaf, Tensor)):
            raise SweepError(f"the gradient of state {name}: expected a tensor or None, got {type(leaf).__name__}")
    return leaves
