"""Measurements of a model at work: a few chunks of several sizes, forward and back, on the call's own inputs.

Each size is run over a few chunks, some of them on a tape: twice under a clock, and between that under a count of the
bytes that are alive. What these runs make is dropped: `.grad`, buffers, generators and sinks are as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimgrad.budget.fit import SHRUNK, Fit, Point, Small
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.process import malloc_bytes
from slimgrad.call.arguments import Call, Started
from slimgrad.states import raw_tensor
from slimgrad.states.base import Root, State
from slimgrad.states.rows import Growing, RowsCarrier
from slimgrad.sweep import tree
from slimgrad.sweep.cut import Cut, Span
from slimgrad.sweep.program import ChunkResult, Event, OnChunk, Piece
from slimgrad.sweep.progress import Progress
from slimgrad.sweep.random import generators
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.keep import Keep
from slimgrad.sweep.store import alignment_bytes

PROBED_TAPE = 2  # chunks of a probe on the tape: the second finds no memory that the first has used
MakeCall = Callable[[int, Schedule, OnChunk | None], Call]  # over so many of the first tokens


@dataclass
class Costs:
    """What chunks of a model take, and what a sweep holds between them. Bytes, seconds.

    Attributes:
        bytes: the most that is alive during a chunk beside what stands by itself below: "forward" (for the next state),
            "reverse" (also while it is put on the tape); "kept", what a chunk on the tape leaves alive; and "held",
            what stands between two chunks: one state at hand with its adjoint and all that goes with it, but for rows.
        small: of these, bytes in blocks that the allocator cuts out of its heap.
        large: bytes of the other blocks that one chunk makes, "forward", "reverse", on the "tape" there and back.
        seconds: of a chunk "forward", on the "tape" (there and back), "reverse".
        plain: a kept copy of the state's plain tensors, without those that never change.
        sums: a kept copy of everything else that can be rolled back.
        rows: each token's rows, of all states that grow.
        row_grads: and their gradients.
        given: rows that the state has before the first token.
        reach: how many rows before it a chunk sees, at most; None: all, as far as is known.
        final: the state after the last token, for the caller.
        along: each token's outputs or losses with their gradients, where they are collected, and gradients of inputs.
        gradients: the buffers in which the parameters' gradients gather.
        records: 64-bit checksums of each chunk.
        graph: of a chunk's graph what is no tensor: its nodes. Of a model that loops over tokens they are many.
    """

    bytes: dict[str, Fit] = field(default_factory=dict[str, Fit])
    small: dict[str, Small] = field(default_factory=dict[str, Small])
    large: dict[str, Fit] = field(default_factory=dict[str, Fit])
    seconds: dict[str, Fit] = field(default_factory=dict[str, Fit])
    plain: int = 0
    sums: int = 0
    rows: float = 0.0
    row_grads: float = 0.0
    given: int = 0
    reach: int | None = None
    final: int = 0
    along: float = 0.0
    gradients: int = 0
    records: int = 0
    graph: Fit | None = None


class Prober:
    """Measures, and holds what was measured.

    Args:
        head: whether the first sweep runs chunks with their heads.
        differentiates: False for a forward sweep alone.
        threshold: bytes of a block from which on the allocator maps it by itself.

    Attributes:
        costs: what was found so far.
        sizes: chunks that were measured.
        states: of models with rows, the state after so many tokens, to measure from there: for who planned to forget.
        far: after how many tokens was measured.
    """

    def __init__(self, *, head: bool, differentiates: bool, threshold: int) -> None:
        self._head, self._differentiates, self._threshold = head, differentiates, threshold
        self._points: dict[str, dict[str, list[Point]]] = {"bytes": {}, "large": {}, "seconds": {}}
        self._small: dict[str, list[list[Point]]] = {}  # of each name, for each of SHRUNK
        self._left: list[Point] = []  # what a chunk on the tape leaves in malloc's books, tensors included
        self.costs = Costs()
        self.sizes: list[int] = []
        self.states: dict[int, Any] = {}
        self.far = 0
        self._leaves: list[Tensor | None] = []  # the buffers of gradients: shapes that take no memory
        self._wide: dict[str, Tensor] = {}
        self._along_bytes = 0

    def measure(self, make: MakeCall, chunk: int, tokens: int) -> None:
        """Measure chunks of `chunk` tokens.

        Args:
            make: a call over so many of the first tokens, in chunks of that size.
            chunk: tokens.
            tokens: in all: two chunks at least, where the sequence has as many.
        """
        self._time(make, chunk, tokens)
        self._count(make, chunk, tokens)
        self._time(make, chunk, tokens)
        self.sizes.append(chunk)
        self._fit()

    def measure_after(self, make: MakeCall, chunk: int, before: int) -> None:
        """Measure the bytes of two chunks after so many tokens, a key of `states`: `make` begins there."""
        self._count(make, chunk, 2 * chunk, before)
        self._fit()

    def _fit(self) -> None:
        costs = self.costs
        for what, fits in (("bytes", costs.bytes), ("large", costs.large), ("seconds", costs.seconds)):
            for name, points in self._points[what].items():
                fits[name] = Fit(points, grows=costs.rows > 0, seconds=what == "seconds", reach=costs.reach)
        kept = {point[:2]: point.value for point in self._points["bytes"].get("kept", ())}
        left = [(point[:2], point.value) for point in self._left if point[:2] in kept]
        nodes = [Point(*place, max(0.0, value - kept[place])) for place, value in left]
        costs.graph = Fit(nodes, grows=costs.rows > 0, reach=costs.reach) if nodes else None
        for name, series in self._small.items():
            costs.small[name] = Small([Fit(points, grows=costs.rows > 0, reach=costs.reach) for points in series])

    def _note(self, what: str, name: str, span: Span, before: int, value: float) -> None:
        points = self._points[what].setdefault(name, [])
        points.append(Point(span.stop - span.start, before + span.start, value))

    def _count(self, make: MakeCall, chunk: int, tokens: int, before: int = 0) -> None:
        """A chunk begins when it is read, without what the one before it left, and ends when it is collected.

        One that is reversed from the tape begins when its backward pass does, but for its own graph. What grows by
        itself, as buffers of rows do, is no part of it. Gradients and adjoint are there when the reverse sweep begins,
        so that its first chunk is like the others.
        """
        live, after = LiveBytes([self._threshold // shrunk for shrunk in SHRUNK]), before > 0
        begun = peak = _NONE
        kept, to_tape = dict[int, _Bytes](), dict[int, _Bytes]()
        made, made_for_tape = 0, dict[int, int]()

        def now() -> _Bytes:
            return _Bytes(live.live - self._by_itself(started), tuple(live.small))

        def read(span: Span, *, head: bool) -> Piece:
            nonlocal begun, made
            begun, made = now(), live.made_large
            if self._is_held(started, span):
                self._note("bytes", "held", span, before, begun.all)
            live.reset_peak()
            piece = as_read(span, head=head)
            if program.data.targets is None and isinstance(piece.targets, Tensor) and span.stop < program.time:
                piece.targets = piece.targets.clone(memory_format=torch.contiguous_format)  # as the last chunk's are
            return piece

        def backward(span: Span, roots: Sequence[Root], leaves: Sequence[Tensor]) -> None:
            nonlocal begun, made
            if span.start in kept:
                own = kept.pop(span.start)
                begun, made = now().less(own), live.made_large
                live.reset_peak()
            as_backward(span, roots, leaves)

        def collect(piece: Piece, result: ChunkResult, phase: str) -> None:
            nonlocal peak
            peak = _Bytes(live.peak - self._by_itself(started), tuple(live.peak_small))
            as_collected(piece, result, phase)

        def note(name: str, span: Span, found: _Bytes) -> None:
            self._note("bytes", name, span, before, found.all)
            series = self._small.setdefault(name, [[] for _ in SHRUNK])
            for points, value in zip(series, found.small, strict=True):
                points.append(Point(span.stop - span.start, before + span.start, value))

        def on_chunk(event: Event) -> None:
            span, large = Span(event.start, event.stop), live.made_large - made
            if event.phase == "reverse":
                name = "tape" if span.start in made_for_tape else "reverse"
                self._note("large", name, span, before, large + made_for_tape.pop(span.start, 0))
                run, back = to_tape.get(span.start, _NONE), peak.less(begun)  # without a tape it would be run now
                note("reverse", span, _Bytes(max(run.all, back.all), tuple(map(max, run.small, back.small))))
            elif self._is_on_tape(event, chunk, tokens):
                to_tape[span.start], kept[span.start] = peak.less(begun), now().less(begun)
                made_for_tape[span.start] = large
                note("kept", span, kept[span.start])
            elif span.start or not after:  # the first after other tokens has a second copy of their rows for a moment
                note("forward", span, peak.less(begun))
                self._note("large", "forward", span, before, large)

        with live:
            call, started = self._begin(make, chunk, tokens, on_chunk)
            before += self._look_at_rows(started, given=not after)
            program = started.program
            as_read, as_backward, as_collected = program.read, program.backward, program.collect
            program.read, program.backward, program.collect = read, backward, collect
            self._run(call, started, gradients=True)
        for name in ("read", "backward", "collect"):  # or they would keep all of it alive
            del vars(program)[name]

    def _time(self, make: MakeCall, chunk: int, tokens: int) -> None:
        last, on_the_way, in_use = 0.0, dict[int, float](), dict[int, int | None]()

        def on_chunk(event: Event) -> None:
            nonlocal last
            _wait_for(call.shared.device)
            taken, span = perf_counter() - last, Span(event.start, event.stop)
            if not self._is_on_tape(event, chunk, tokens):
                if event.start or event.phase != "forward" or tokens <= 2 * chunk:  # the first warms up
                    self._note("seconds", event.phase, span, given, taken)
            elif event.phase == "forward":
                on_the_way[event.start] = taken
                in_use[event.start] = now = malloc_bytes()
                if (before := in_use.get(event.start - chunk)) is not None and now is not None:
                    self._left.append(Point(span.stop - span.start, given + span.start, now - before))
            elif event.start in on_the_way:  # else the tape did not fit
                self._note("seconds", "tape", span, given, taken + on_the_way[event.start])
            last = perf_counter()

        call, started = self._begin(make, chunk, tokens, on_chunk)
        given = self._look_at_rows(started, given=True)
        last = perf_counter()
        self._run(call, started)

    def _by_itself(self, started: Started) -> int:
        """Bytes now of all that the account has beside chunk, state and adjoint."""
        program, progress = started.program, started.run.progress
        gather, collected = program.shared.gather, program.collected
        along = sum(x.nbytes for x in (*collected.along, *collected.input_grads) if x is not None)
        rows = sum(carrier.nbytes for carrier in _rows_of(started))
        gathered = 0 if gather is None else gather.nbytes
        return along + self._along_bytes + rows + progress.store.nbytes + gathered + _final_bytes(progress)

    def _is_held(self, started: Started, span: Span) -> bool:
        """Whether state and adjoint are there, and no graph."""
        if not self._differentiates or "held" not in self._points["bytes"]:
            return True
        run, time = started.run, started.program.time
        return run.progress.phase == "reverse" and run.holds_no_graph and span.stop < time

    def _is_on_tape(self, event: Event, chunk: int, tokens: int) -> bool:
        count = len(Cut(tokens, chunk))
        return self._differentiates and event.start >= chunk * (count - _taped(count))

    def _begin(self, make: MakeCall, chunk: int, tokens: int, on_chunk: OnChunk) -> tuple[Call, Started]:
        call = make(tokens, Keep(tape=_taped(len(Cut(tokens, chunk)))), on_chunk)
        to_end = self._head and self._differentiates  # as a loss, or outputs, to go back from later
        return call, call.start(0, differentiates=self._differentiates, to_end=to_end)

    def _run(self, call: Call, started: Started, *, gradients: bool = False) -> None:
        started.run.forward(head=self._head)
        if not self._differentiates:
            self._look_at_kept(started)
            return
        assert call.gather is not None
        if gradients:
            if started.run.progress.final_state is not None:
                _enter_zeros(started.run.progress)
            zeros = [None if x is None else torch.zeros_like(x) for x in self._leaves]
            wide = {name: torch.zeros_like(x) for name, x in self._wide.items()}
            call.gather.load_state({"leaves": zeros, "wide": wide, "backwards": 1, "sinks": {}})
            del zeros, wide
        self._look_at_kept(started)
        along = [torch.ones_like(x) for x in started.program.collected.along]  # their cotangents, whole as a caller's
        self._along_bytes = sum(x.nbytes for x in along)
        started.reverse(lambda span: [x[:, slice(*span)] for x in along] if along else [call.loss_grad])
        self._along_bytes = 0
        self.costs.gradients = max(self.costs.gradients, call.gather.nbytes)
        gathered = call.gather.state()
        self._leaves = [None if x is None else _shape_of(x) for x in gathered["leaves"]]
        self._wide = {name: _shape_of(x) for name, x in gathered["wide"].items()}
        del gathered
        call.gather.take()  # what is left of a call refers to itself, and should not be as large as the model

    def _look_at_rows(self, started: Started, *, given: bool) -> int:
        """How many rows the state begins with."""
        if given:
            self.costs.given = max((carrier.length for carrier in _rows_of(started)), default=0)
        return self.costs.given

    def _look_at_kept(self, started: Started) -> None:
        """What copies of the state take, and which of its tensors never change: these are kept once."""
        costs, progress, program = self.costs, started.run.progress, started.program
        align = alignment_bytes(program.device)
        along = sum(x.nbytes for x in program.collected.along) * (2 if self._differentiates else 1)
        input_grads = sum(x.nbytes for x in program.collected.input_grads if x is not None)
        costs.along = (along + input_grads) / program.time
        if progress.final_state is None:  # of a single chunk, which is reversed straight away
            return
        costs.final = _final_bytes(progress)
        costs.sums = 0
        costs.rows = costs.row_grads = 0.0
        leaves, plain = tree.leaves(progress.final_state), 0
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, State):
                costs.sums += leaf.kept_bytes()
            elif isinstance(leaf, Tensor):
                tokens = {id(tokens[number]) for _, _, tokens in progress.slots.values()}
                plain += -(-leaf.nbytes // align) * align if len(tokens) > 1 else 0
            if isinstance(leaf, Growing):
                row = leaf.value[:, :1]
                costs.rows += row.nbytes
                costs.row_grads += row.numel() * max(4, row.dtype.itemsize) if self._differentiates else 0
        costs.plain = max(costs.plain, plain)  # where one state alone was kept, nothing has changed
        costs.records = len(leaves) + len(tree.leaves(program.data.inputs.whole)) + 2
        reaches = [_reach_of(carrier) for carrier in _rows_of(started)]
        known = [reach for reach in reaches if reach is not None]
        costs.reach = max([costs.reach or 0, *known]) if known and len(known) == len(reaches) else costs.reach
        if costs.rows:
            self.states.setdefault(program.time, progress.final_state)


class _Bytes(NamedTuple):
    """Alive, and of these in small blocks."""

    all: int
    small: tuple[int, ...]

    def less(self, other: _Bytes) -> _Bytes:
        """Without those."""
        return _Bytes(self.all - other.all, tuple(x - y for x, y in zip(self.small, other.small, strict=True)))


_NONE = _Bytes(0, (0,) * len(SHRUNK))


def _taped(count: int) -> int:
    return min(PROBED_TAPE, count - 1)


def _shape_of(x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(x.shape)


def _enter_zeros(progress: Progress) -> None:
    """The adjoint begins with zeros, in place of nothing."""
    values = [raw_tensor(leaf) for leaf in tree.leaves(progress.final_state)]
    floating = [x is not None and (x.is_floating_point() or x.is_complex()) for x in values]
    zeros = [_shape_of(x) if x is not None and takes else None for x, takes in zip(values, floating, strict=True)]
    progress.expect(tree.unflatten(zeros, progress.spec))


def _rows_of(started: Started) -> list[RowsCarrier]:
    return [carrier for carrier in started.run.progress.carriers if isinstance(carrier, RowsCarrier)]


def _final_bytes(progress: Progress) -> int:
    """Of the state after the last chunk, but for rows, which it shares with the buffer."""
    leaves = [leaf for leaf in tree.leaves(progress.final_state) if not isinstance(leaf, Growing)]
    return sum(x.nbytes for x in map(raw_tensor, leaves) if x is not None)


def _reach_of(carrier: RowsCarrier) -> int | None:
    """How many rows before it the last chunk asked for, where that was not all there were."""
    reach = carrier._reach  # pyright: ignore[reportPrivateUsage]
    return reach if reach is not None and reach < carrier.length else None


@contextmanager
def as_it_was(model: nn.Module) -> Generator[None]:
    """After the block the model's buffers and the generators are as they were."""
    devices = {x.device for x in (*model.parameters(), *model.buffers())}
    buffers = [(x, x.detach().clone()) for x in model.buffers()]
    states = [(generator, generator.get_state()) for generator in generators(*devices)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        for x, copy in buffers:
            if not torch.equal(x, copy):
                with torch.no_grad():
                    x.copy_(copy)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
