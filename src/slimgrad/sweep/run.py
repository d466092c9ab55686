"""The two sweeps over one sequence, in two calls: everything else stands on them.

    run = Run(program, progress)
    run.forward()                                # states only, or with the head
    gradient = run.reverse(cotangents)           # chunk by chunk, last first; gives the initial state's gradient

A `Program` is what a sweep runs: a chunk by its span. It knows the model, the inputs and the loss; the sweep knows none
of them. All that a gradient under way is, is in its `Progress`; here is what carries it on, move by move.

Algorithm 1 of "Sub-Linear Memory: How to Make Performers SLiM" (NeurIPS 2021), with the schedule and the kinds of state
made parameters. Cost over plain backpropagation: `schedule.num_advances` chunks forward. Memory: one chunk's graph, the
kept states, one adjoint, the gathered gradients, and 16 bytes per chunk and state for the checksums.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgrad.errors import ConsumedError, MemoryLimitError, ModelError, StateMismatchError, SweepError
from slimgrad.states.base import Purpose, Root
from slimgrad.sweep import tree
from slimgrad.sweep.allocation import is_allocation_failure, release
from slimgrad.sweep.cut import Span
from slimgrad.sweep.graphless import graphless, wants_graph
from slimgrad.sweep.moves import Move
from slimgrad.sweep.program import ChunkResult, Event, OnChunk, Piece, Program, inside_chunk, refuse_nesting
from slimgrad.sweep.progress import Progress
from slimgrad.sweep.schedules.base import Kind

logger = logging.getLogger("slimgrad")
Cotangents = Callable[[Span], Sequence[Tensor | None]]


class _Taped(NamedTuple):
    """A chunk whose graph is kept: what was read, what came of it, and what each leaf of the state had of it."""

    piece: Piece
    result: ChunkResult
    aside: list[dict[str, Any]]


class Run:
    """One sequence, swept forward once and back once.

    Args:
        program: the chunks.
        progress: where it stands: at the beginning, or wherever it was saved.
        on_chunk: called with an `Event` after each chunk.
        differentiates: False for a forward sweep that nobody will go back over: no bits are noted.
    """

    def __init__(
        self, program: Program, progress: Progress, *, on_chunk: OnChunk | None = None, differentiates: bool = True
    ) -> None:
        refuse_nesting()
        self.progress = progress
        self._program, self._on_chunk, self._differentiates = program, on_chunk, differentiates
        self._tape: dict[Span, _Taped] = {}
        self._keeps_graphs = False  # of the first sweep's chunks: the model differentiates on its way
        self._in_backward = self._is_over = False  # how far the chunk at hand has come

    @property
    def holds_no_graph(self) -> bool:
        """Whether no chunk's graph is kept on a tape now."""
        return not self._tape

    def forward(self, *, head: bool = False) -> tree.Tree:
        """Sweep forward, keeping the states that the schedule asks for.

        Args:
            head: run every chunk with its head, so that the program collects its outputs.

        Returns:
            The final state, if the moves go to the end; else None.
        """
        progress = self.progress
        self._enter("forward", after="new")
        try:
            if progress.moves.reached == 0 and self._differentiates:
                progress.compare(Move(Kind.STORE, Span(0, 0)), {}, ())
            with torch.no_grad():
                while progress.moves.is_forward:
                    self._go_on(head, _no_cotangents)
        except BaseException:
            self._tape.clear()
            progress.close()
            raise
        progress.phase = "swept"
        return progress.final_state

    def reverse(self, cotangents: Cotangents) -> tree.Tree:
        """Sweep back, last chunk first, gathering gradients in the program's parameters.

        Args:
            cotangents: from a chunk's span to those of its outputs (None: zero). For the gradient of the final state
                see `Progress.expect`.

        Returns:
            The gradient of the initial state: its tree, with a tensor for each leaf, or None where no gradient came.
        """
        progress = self.progress
        self._enter("reverse", after="swept")
        try:
            with torch.no_grad():
                while progress.moves.next() is not None:
                    self._go_on(False, cotangents)
            return progress.adjoint()
        finally:
            self._tape.clear()
            progress.close()

    def _enter(self, phase: str, *, after: str) -> None:
        if self.progress.phase not in (after, phase):
            raise ConsumedError(
                f"this run is {self.progress.phase!r}, expected {after!r}: a run goes forward once and back once. "
                "Start a new one (call slimgrad again) for another gradient"
            )
        self.progress.phase = phase

    def _go_on(self, head: bool, cotangents: Cotangents) -> None:
        """Carry out the next move. Where it does not fit into memory, finer ones take its place."""
        progress, move = self.progress, self.progress.moves.next()
        assert move is not None
        failure, result, wanted_graph, from_tape = "", None, False, move.span in self._tape
        self._in_backward = self._is_over = False
        try:
            if move.kind in (Kind.STORE, Kind.LOAD, Kind.FREE):
                progress.use_slot(move)
            else:
                progress.fetch_ahead()
                if move.kind is Kind.REVERSE:
                    result = self._reverse(move, cotangents)
                else:
                    result = self._put_on_tape(move) if move.kind is Kind.TAPE else self._advance(move, head)
        except Exception as error:
            wanted_graph = move.kind is not Kind.REVERSE and not self._keeps_graphs and wants_graph(error)
            if not (wanted_graph or is_allocation_failure(error)):
                raise
            failure = f"{type(error).__name__}: {error}"
        # what follows waits for the end of the except block: its traceback holds the chunk's tensors
        if failure:
            if move.kind is Kind.TAPE or from_tape:
                self._tape.clear()
            progress.rewind(move)
            release(self._program.device)
            self._keeps_graphs = self._keeps_graphs or wanted_graph
            if not wanted_graph:
                self._split(move, failure, from_tape=from_tape)
            return
        progress.moves.done()
        if result is not None:
            self._tell(move, result)

    def _split(self, move: Move, failure: str, *, from_tape: bool) -> None:
        span, moves = move.span, self.progress.moves
        where = f"{span} did not fit into memory ({failure.splitlines()[0]})"
        if self._is_over:
            raise MemoryLimitError(
                f"{where}, when it had been run and what came of it was put in its place. Every .grad is as it was "
                "before the call. Use a smaller chunk=, or free some memory"
            )
        seen_whole = move.kind in (Kind.ADVANCE, Kind.REVERSE) and not move.finer and span.stop <= moves.reached
        if moves.draws and seen_whole and not from_tape:
            raise SweepError(
                f"{where} in the reverse sweep, and cannot be taken in parts: the model draws random numbers "
                "(dropout), and would draw others for other shapes. Use a smaller chunk=, or turn dropout off"
            )
        # the adjoint of the last chunk is entered again
        intact = span.stop == moves.cut.length or all(c.is_intact for c in self.progress.carriers)
        if self._in_backward and not (intact and self._program.forget()):
            raise MemoryLimitError(
                f"{where}, in the backward pass, when a part of the gradients had been added, which cannot be told "
                "from other chunks' now. Every .grad is as it was before the call. Use a smaller chunk=, or save a "
                "slimgrad.Segment on the way, which goes on from there by itself"
            )
        if move.kind not in (Kind.ADVANCE, Kind.TAPE, Kind.REVERSE) or not moves.split():
            raise MemoryLimitError(
                f"{where}, and cannot be taken in smaller parts. Use a smaller chunk=, or free some memory"
            )
        then = "going on without a tape" if move.kind is Kind.TAPE or from_tape else "taken in parts from here on"
        logger.warning("%s: %s", where, then)

    def _advance(self, move: Move, head: bool) -> ChunkResult:
        """Run a chunk for a state alone (and its outputs): the one after it, or, retraced, the one before."""
        progress, span = self.progress, move.span
        is_first = span.stop > progress.moves.reached
        purpose = Purpose.RETRACE if move.kind is Kind.RETRACE else Purpose.FORWARD if is_first else Purpose.AGAIN
        graph = graphless() if self._differentiates and not self._keeps_graphs else nullcontext()
        head = head and is_first
        piece = self._program.read(span, head=head)
        # Gradients are on as in the reverse sweep, though nobody asks for them here: torch chooses some kernels by it
        # (matmul folds or batches, recurrent layers have a kernel for inference), with other bits
        with (
            inside_chunk(),
            self._program.chunk_context(span.start),
            torch.set_grad_enabled(self._differentiates),
            graph,
            self._noting_draws(is_first=is_first),
        ):
            result = self._run(move, purpose, piece, head)
        progress.compare(move, piece.read, result.outputs, bits=self._differentiates)
        self._is_over = True
        progress.settle(piece.leaves)
        progress.same_bits = progress.same_bits and not move.finer
        if is_first:
            if span.stop == progress.moves.cut.length:
                progress.end()
            self._program.collect(piece, result, "forward")
        return result

    @contextmanager
    def _noting_draws(self, *, is_first: bool) -> Generator[None]:
        """Note whether the model draws random numbers: in parts of a chunk it would draw others."""
        wanted = is_first and self._differentiates and not self.progress.moves.draws
        before = self._program.draws() if wanted else []
        yield
        if wanted and before != self._program.draws():
            self.progress.moves.draws = True

    def _put_on_tape(self, move: Move) -> ChunkResult:
        """Run a chunk with its head, and keep its graph for its reversal."""
        progress, span = self.progress, move.span
        is_first = span.stop > progress.moves.reached
        piece = self._program.read(span, head=True)
        with (
            inside_chunk(),
            self._program.chunk_context(span.start),
            torch.enable_grad(),
            self._noting_draws(is_first=is_first),
        ):
            result = self._run(move, Purpose.TAPE, piece, True)
        progress.compare(move, piece.read, result.outputs)
        self._is_over = True
        if span.stop == progress.moves.cut.length:
            progress.end()
        self._tape[span] = _Taped(piece, result, progress.put_aside())
        if is_first:
            self._program.collect(piece, result, "forward")
        return result

    def _reverse(self, move: Move, cotangents: Cotangents) -> ChunkResult:
        """One chunk of Algorithm 1: before -> step -> after -> Phi -> gradients, and the adjoint before."""
        progress, span = self.progress, move.span
        taped = self._tape.pop(span, None)
        piece = self._program.read(span, head=True) if taped is None else taped.piece
        with inside_chunk(), self._program.chunk_context(span.start):
            if taped is not None:
                result = taped.result
                progress.take_up(taped.aside)
                taped = None
            else:
                with torch.enable_grad():
                    result = self._run(move, Purpose.REVERSE, piece, True)
                progress.compare(move, piece.read, result.outputs)
            if span.stop == progress.moves.cut.length:
                progress.end()
                progress.enter_final_gradient()
            # Phi, term by term: the outputs with their cotangents, the state after the chunk with the adjoint
            roots = progress.roots()
            for output, cotangent in zip(result.outputs, cotangents(span), strict=True):
                if cotangent is not None and output.requires_grad:
                    roots.append(Root(output, cotangent.to(output.dtype).expand_as(output)))
            if roots:
                self._in_backward = True
                self._program.backward(span, roots, [*piece.leaves, *progress.sources()])
        self._is_over = True
        progress.settle(piece.leaves)
        self._program.collect(piece, result, "reverse")
        return result

    def _run(self, move: Move, purpose: Purpose, piece: Piece, head: bool) -> ChunkResult:
        run = self._program.run if head else self._program.advance
        try:
            result = run(piece, self.progress.bind(move, purpose))
        except StateMismatchError:
            for name, number in piece.read.items():  # perhaps the model was given something else
                self.progress.witness.compare_read(name, move.span, int(number))
            raise
        except RuntimeError as error:
            if "leaf Variable that requires grad" not in str(error):
                raise
            raise _modified_in_place(self.progress, move.span) from error
        self.progress.take(result.state)
        return result

    def _tell(self, move: Move, result: ChunkResult) -> None:
        if self._on_chunk is None:
            return
        progress = self.progress
        phase = "reverse" if move.kind is Kind.REVERSE else "forward" if progress.phase == "forward" else "again"
        loss = None if result.loss is None else float(result.loss.detach().sum())
        norm = progress.adjoint_norm() if phase == "reverse" else None
        self._on_chunk(Event(phase, *move.span, progress.moves.cut.length, loss, progress.held_bytes, norm))


def everywhere(cotangent: Tensor | None) -> Cotangents:
    """The same cotangent for the one output of every chunk: that of a sum."""
    return lambda span: [cotangent]


def _no_cotangents(span: Span) -> Sequence[Tensor | None]:
    raise AssertionError(span)


def _modified_in_place(progress: Progress, span: Span) -> ModelError:
    names = ", ".join(carrier.name for carrier in progress.carriers)
    return ModelError(
        f"a state ({names}), an input, the context or a parameter was modified in place in {span}; expected a new "
        "tensor (the old one is still needed on the way back). Use out-of-place operations, or clone what is written "
        "to first: state = state.clone()"
    )
