"""Measurements of a model at work: a few chunks of several sizes, forward and back, on the call's own inputs.

Each size is run over a few chunks, some of them on a tape: once under a count of the bytes that are alive, and then
under a clock. What these runs make is dropped: `.grad`, buffers, generators and sinks are as they were.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.budget.fit import Fit, Point
from slimgrad.budget.live import LiveBytes
from slimgrad.call.arguments import Call, Started
from slimgrad.states.base import State
from slimgrad.states.rows import Growing, RowsCarrier
from slimgrad.sweep import tree
from slimgrad.sweep.program import Event, OnChunk
from slimgrad.sweep.random import generators
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.keep import Keep
from slimgrad.sweep.store import alignment_bytes

_TAPE = 2  # chunks of a probe on the tape: the second finds no memory that the first has used
_TIMES = 2  # under the clock
MakeCall = Callable[[int, Schedule, OnChunk], Call]  # over so many of the first tokens


@dataclass
class Costs:
    """What chunks of a model take, and what a sweep holds between them. Bytes, seconds.

    Attributes:
        bytes: the most that is alive during a chunk above what was before it: "forward" (for the next state), "tape",
            "reverse"; and "kept", what a chunk on the tape leaves alive.
        small: of these, bytes in blocks that the allocator cuts out of its heap.
        seconds: of a chunk "forward", on the "tape" (there and back), "reverse".
        held: one state at hand with its adjoint and all that goes with it, but for rows.
        plain: a kept copy of the state's plain tensors, without those that never change.
        sums: a kept copy of everything else that can be rolled back.
        rows: each token's rows, with their gradients.
        along: each token's outputs or losses, where they are collected, and gradients of inputs.
        gradients: the buffers in which the parameters' gradients gather.
        records: 64-bit checksums of each chunk.
    """

    bytes: dict[str, Fit] = field(default_factory=dict[str, Fit])
    small: dict[str, Fit] = field(default_factory=dict[str, Fit])
    seconds: dict[str, Fit] = field(default_factory=dict[str, Fit])
    held: int = 0
    plain: int = 0
    sums: int = 0
    rows: float = 0.0
    along: float = 0.0
    gradients: int = 0
    records: int = 0


class Prober:
    """Measures, and holds what was measured.

    Args:
        head: whether the first sweep runs chunks with their heads.
        differentiates: False for a forward sweep alone.
        threshold: bytes of a block from which on the allocator maps it by itself.

    Attributes:
        costs: what was found so far.
        sizes: chunks that were measured.
    """

    def __init__(self, *, head: bool, differentiates: bool, threshold: int) -> None:
        self._head, self._differentiates, self._threshold = head, differentiates, threshold
        self._points: dict[str, dict[str, list[Point]]] = {"bytes": {}, "small": {}, "seconds": {}}
        self.costs = Costs()
        self.sizes: list[int] = []

    def measure(self, make: MakeCall, chunk: int, count: int) -> None:
        """Measure chunks of `chunk` tokens, over `count` of them.

        Args:
            make: a call over so many of the first tokens, in chunks of that size.
            chunk: tokens.
            count: of chunks: 2 at least, where the sequence has as many.
        """
        self._count(make, chunk, count)
        for _ in range(_TIMES):
            self._time(make, chunk, count)
        gc.collect()  # what a sweep leaves behind refers to itself
        self.sizes.append(chunk)
        for what, fits in (("bytes", self.costs.bytes), ("small", self.costs.small), ("seconds", self.costs.seconds)):
            for name, points in self._points[what].items():
                fits[name] = Fit(points, grows=self.costs.rows > 0, seconds=what == "seconds")

    def _note(self, what: str, name: str, event: Event, value: float) -> None:
        points = self._points[what].setdefault(name, [])
        points.append(Point(event.stop - event.start, event.start, value))

    def _count(self, make: MakeCall, chunk: int, count: int) -> None:
        live, before, small = LiveBytes(self._threshold), 0, 0

        def on_chunk(event: Event) -> None:
            nonlocal before, small
            on_tape = self._is_on_tape(event, chunk, count)
            if event.phase == "forward" or not on_tape:
                name = "reverse" if event.phase == "reverse" else "tape" if on_tape else "forward"
                self._note("bytes", name, event, live.peak - before)
                self._note("small", name, event, live.peak_small - small)
            if event.phase == "forward" and on_tape:
                self._note("bytes", "kept", event, live.live - before)
                self._note("small", "kept", event, live.small - small)
            if event.phase == "reverse":
                self._look_at(started, live.live)
            before, small = live.live, live.small
            live.reset_peak()

        gc.collect()
        with live:
            call, started = self._begin(make, chunk, count, on_chunk)
            before, small = live.live, live.small
            live.reset_peak()
            self._run(call, started)
        if not self._differentiates:
            self.costs.held = max(self.costs.held, before)

    def _time(self, make: MakeCall, chunk: int, count: int) -> None:
        last, on_the_way = 0.0, dict[int, float]()

        def on_chunk(event: Event) -> None:
            nonlocal last
            _wait_for(call.shared.device)
            taken = perf_counter() - last
            if not self._is_on_tape(event, chunk, count):
                if event.start or event.phase != "forward" or count == 2:  # the first warms up
                    self._note("seconds", event.phase, event, taken)
            elif event.phase == "forward":
                on_the_way[event.start] = taken
            else:
                self._note("seconds", "tape", event, taken + on_the_way[event.start])
            last = perf_counter()

        call, started = self._begin(make, chunk, count, on_chunk)
        last = perf_counter()
        self._run(call, started)

    def _is_on_tape(self, event: Event, chunk: int, count: int) -> bool:
        return self._differentiates and event.start >= chunk * (count - min(_TAPE, count - 1))

    def _begin(self, make: MakeCall, chunk: int, count: int, on_chunk: OnChunk) -> tuple[Call, Started]:
        call = make(count * chunk, Keep(tape=min(_TAPE, count - 1)), on_chunk)
        return call, call.start(0, differentiates=self._differentiates)

    def _run(self, call: Call, started: Started) -> None:
        started.run.forward(head=self._head)
        if not self._differentiates:
            return
        self._look_at_kept(started)
        along = started.program.collected.along
        started.reverse(
            lambda span: [torch.ones_like(x[:, slice(*span)]) for x in along] if along else [call.loss_grad]
        )

    def _look_at_kept(self, started: Started) -> None:
        """What copies of the state take, and which of its tensors never change: these are kept once."""
        costs, progress = self.costs, started.run.progress
        align = alignment_bytes(started.program.device)
        costs.plain = costs.sums = 0
        leaves = tree.leaves(progress.final_state)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, State):
                costs.sums += leaf.kept_bytes()
            elif isinstance(leaf, Tensor):
                tokens = {id(tokens[number]) for _, _, tokens in progress.slots.values()}
                costs.plain += -(-leaf.nbytes // align) * align if len(tokens) > 1 else 0
        tokens_before = started.program.time
        costs.rows = sum(
            leaf.value.nbytes / tokens_before * (1 + max(4 / leaf.dtype.itemsize, 1))
            for leaf in leaves
            if isinstance(leaf, Growing)
        )
        costs.records = len(leaves) + len(tree.leaves(started.program.data.inputs.whole)) + 2

    def _look_at(self, started: Started, live: int) -> None:
        """What is held between two chunks of the reverse sweep."""
        costs, progress, collected = self.costs, started.run.progress, started.program.collected
        gather = started.program.shared.gather
        assert gather is not None
        costs.gradients = max(costs.gradients, gather.nbytes)
        rows = sum(carrier.nbytes for carrier in progress.carriers if isinstance(carrier, RowsCarrier))
        along = sum(x.nbytes for x in (*collected.along, *collected.input_grads) if x is not None)
        costs.along = along / started.program.time
        if started.run.holds_no_graph:
            costs.held = max(costs.held, live - gather.nbytes - progress.store.nbytes - rows - along)


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


def first_tokens(given: Any, tokens: int) -> Any:
    """Inputs or targets cut off after so many tokens: leaves of their own, where they take gradients."""
    if hasattr(given, "read"):
        return _Beginning(given, tokens)

    def cut(x: Tensor) -> Tensor:
        part = x[:tokens] if x.dim() == 1 else x[:, :tokens]
        return part.detach().requires_grad_() if x.requires_grad else part

    return tree.map_tensors(cut, given)


class _Beginning:
    """The beginning of what a reader gives."""

    def __init__(self, reader: Any, length: int) -> None:
        self._reader, self.length, self.batch = reader, length, reader.batch

    def read(self, start: int, stop: int) -> Any:
        return self._reader.read(start, stop)
