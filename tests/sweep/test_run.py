"""The two calls everything stands on: what a run says, refuses, and does not hold on to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import slimgrad as sg
from slimgrad.states.base import Root
from slimgrad.sweep.cut import Cut, Span
from slimgrad.sweep.moves import Moves
from slimgrad.sweep.program import ChunkResult, Piece
from slimgrad.sweep.progress import Progress
from slimgrad.sweep.run import Run
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(3), sg.Binomial(2)]


CHUNK = 3


class Products:
    """A program without a model: s <- s * weight + n, loss_n = s^2, in scalars that can be checked by hand."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.weight = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
        self.entered: list[int] = []
        self.collected: list[tuple[int, str]] = []

    def read(self, span: Span, *, head: bool) -> Piece:
        assert span.stop == span.start + CHUNK
        return Piece(span, inputs=span.start // CHUNK)

    def chunk_context(self, position: int) -> Any:
        self.entered.append(position // CHUNK)
        return nullcontext()

    def advance(self, piece: Piece, state: Tensor) -> ChunkResult:
        return ChunkResult(state * self.weight + piece.inputs)

    def run(self, piece: Piece, state: Tensor) -> ChunkResult:
        following = self.advance(piece, state).state
        return ChunkResult(following, [following**2], loss=following**2)

    def backward(self, span: Span, roots: Sequence[Root], leaves: Sequence[Tensor]) -> None:
        inputs = [self.weight, *leaves]
        torch.autograd.backward([r.tensor for r in roots], [r.cotangent for r in roots], inputs=inputs)

    def collect(self, piece: Piece, result: ChunkResult, phase: str) -> None:
        self.collected.append((piece.inputs, phase))

    def forget(self) -> bool:
        return False

    def draws(self) -> list[Tensor]:
        return []


def products(num_chunks: int, schedule: sg.Schedule, *, to_end: bool = False) -> tuple[Products, Run]:
    """The program, and a run over it that begins at 2."""
    program, plan = Products(), Moves(Cut(num_chunks * CHUNK, CHUNK), schedule, to_end=to_end)
    return program, Run(program, Progress(torch.tensor(2.0, dtype=torch.float64), plan, seed=0, parts={}))


def by_hand(num_chunks: int, final_gradient: float) -> tuple[float, float, float]:
    """Gradients with respect to the weight and the start, and the final state, by ordinary autograd."""
    weight = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    start = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    state, loss = start, torch.zeros((), dtype=torch.float64)
    for chunk in range(num_chunks):
        state = state * weight + chunk
        loss = loss + (chunk + 1) * state**2
    (loss + final_gradient * state).backward()
    return float(weight.grad), float(start.grad), float(state.detach())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("num_chunks", [1, 2, 9])
@pytest.mark.parametrize("to_end", [False, True])
def test_a_run_by_hand(schedule: sg.Schedule, num_chunks: int, to_end: bool) -> None:
    program, run = products(num_chunks, schedule, to_end=to_end)
    final = run.forward()
    weight_grad, start_grad, expected_final = by_hand(num_chunks, 0.7)
    assert (final is None) == (not to_end)
    swept = num_chunks if to_end else num_chunks - 1
    assert program.entered == list(range(swept))
    run.progress.expect(torch.tensor(0.7, dtype=torch.float64))
    gradient = run.reverse(lambda span: [torch.tensor(span.start / CHUNK + 1.0, dtype=torch.float64)])
    assert float(run.progress.final_state) == pytest.approx(expected_final, rel=1e-15)
    assert float(program.weight.grad) == pytest.approx(weight_grad, rel=1e-14)  # measured 0
    assert float(gradient) == pytest.approx(start_grad, rel=1e-14)
    forward = [(chunk, "forward") for chunk in range(swept)]
    assert program.collected == [*forward, *((chunk, "reverse") for chunk in range(num_chunks - 1, -1, -1))]


def test_a_run_goes_forward_once_and_back_once() -> None:
    def ones(span: Span) -> list[Tensor]:
        return [torch.ones((), dtype=torch.float64)]

    _, run = products(3, sg.Keep())
    with pytest.raises(sg.ConsumedError, match="this run is 'new', expected 'swept'"):
        run.reverse(ones)
    run.forward()
    with pytest.raises(sg.ConsumedError, match="this run is 'swept', expected 'new'"):
        run.forward()
    run.reverse(ones)
    for again in (run.forward, lambda: run.reverse(ones)):
        with pytest.raises(sg.ConsumedError, match="a run goes forward once and back once"):
            again()


def test_a_gradient_of_another_structure_or_shape_is_refused() -> None:
    def gradient(**entries: Any) -> Any:
        return {"h": None, "position": None} | entries

    model = GatedRecurrence()
    call = lambda given: sg.backward(model, TOKENS, chunk=7, final_state_grad=given)  # noqa: E731
    with pytest.raises(sg.SweepError, match="another structure than the state"):
        call(torch.zeros(2, 6))
    with pytest.raises(sg.SweepError, match=r"state \['h'\]: expected the final state's shape \[2, 6\], got \[2, 7\]"):
        call(gradient(h=torch.zeros(2, 7)))
    with pytest.raises(sg.SweepError, match=r"state \['h'\]: expected a tensor or None, got PrefixSum"):
        call(gradient(h=sg.PrefixSum(torch.zeros(2, 6))))
    longer = {"keys": torch.zeros(2, 41, 6), "values": None}
    with pytest.raises(sg.SweepError, match=r"expected the final state's shape \[2, 40, 6\], got \[2, 41, 6\]"):
        sg.backward(CachedAttention(), TOKENS, chunk=7, final_state_grad=longer)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_events_tell_the_plan(schedule: sg.Schedule) -> None:
    events: list[sg.Event] = []
    sg.backward(GatedRecurrence(), TOKENS, chunk=7, schedule=schedule, on_chunk=events.append)
    told = [(event.phase, (event.start, event.stop)) for event in events]
    spans = [(0, 7), (7, 14), (14, 21), (21, 28), (28, 35), (35, 40)]
    advanced = sum(phase != "reverse" for phase, _ in told)
    assert advanced == schedule.num_advances(6)
    assert [span for phase, span in told if phase == "forward"] == spans[:-1]
    assert [span for phase, span in told if phase == "reverse"] == spans[::-1]
    assert {span for phase, span in told if phase == "again"} <= set(spans)
    assert {event.length for event in events} == {40}
    assert all((event.loss is None) == (event.phase != "reverse") for event in events)
    assert all((event.adjoint_norm is None) == (event.phase != "reverse") for event in events)


def test_event_losses_add_up() -> None:
    events: list[sg.Event] = []
    result = sg.backward(GatedRecurrence().double(), TOKENS, chunk=7, on_chunk=events.append)
    total = sum(event.loss for event in events if event.loss is not None) / result.num_targets
    assert total == pytest.approx(float(result.loss), rel=1e-14)
    events.clear()
    loss = sg.loss(GatedRecurrence().double(), TOKENS, chunk=7, on_chunk=events.append)
    assert [event.phase for event in events] == ["forward"] * 6
    assert all(event.loss is not None for event in events)
    loss.backward()
    assert [event.phase for event in events[6:]] == ["reverse"] * 6


@pytest.mark.parametrize("model_type", [GatedRecurrence, CachedAttention, AllKinds, LinearAttention])
def test_adjoint_norms_are_those_of_autograd(model_type: type[torch.nn.Module]) -> None:
    model = model_type().double()
    norms: dict[int, float] = {}

    def note(event: sg.Event) -> None:
        if event.phase == "reverse":
            norms[event.start // 8] = event.adjoint_norm

    sg.backward(model, TOKENS, chunk=8, on_chunk=note, normalizer=1)

    def raw(state: Any) -> list[Tensor]:
        leaves = torch.utils._pytree.tree_leaves(state)
        tensors = [leaf.value if isinstance(leaf, sg.PrefixSum | sg.Growing) else leaf for leaf in leaves]
        return [x for x in tensors if isinstance(x, Tensor) and x.is_floating_point()]

    state, losses, befores = model.initial_state(2), [], []
    targets = torch.nn.functional.pad(TOKENS[:, 1:], (0, 1), value=-100)
    for start in range(0, 40, 8):
        befores.append([x if x.requires_grad else x.requires_grad_() for x in raw(state)])
        outputs, state = model(TOKENS[:, start : start + 8], state)
        losses.append(
            torch.nn.functional.cross_entropy(
                outputs.flatten(0, 1), targets[:, start : start + 8].flatten(), ignore_index=-100, reduction="sum"
            )
        )
    for chunk, before in enumerate(befores):
        gradients = torch.autograd.grad(sum(losses[chunk:]), before, retain_graph=True, allow_unused=True)
        expected = sum(float(g.norm()) ** 2 for g in gradients if g is not None) ** 0.5
        assert norms[chunk] == pytest.approx(expected, rel=1e-6)  # events hold float32 norms: measured 9e-8


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Binomial(2)], ids=str)
def test_held_bytes_do_not_grow_with_sums(schedule: sg.Schedule) -> None:
    most = []
    for length in (64, 256, 1024):
        events: list[sg.Event] = []
        tokens = torch.randint(0, 13, (1, length))
        sg.backward(LinearAttention(), tokens, chunk=16, schedule=schedule, on_chunk=events.append)
        most.append(max(event.held_bytes for event in events))
    assert most[0] == most[1] == most[2]


def test_held_bytes_grow_with_what_is_kept() -> None:
    held: list[int] = []
    sg.backward(GatedRecurrence(), TOKENS, chunk=4, schedule=sg.Keep(), on_chunk=lambda e: held.append(e.held_bytes))
    # nine kept copies of h [2, 6] in float32 and of one int64 counter, each in whole 64 bytes; live state and adjoint
    assert max(held) == 9 * (64 + 64) + (48 + 8) + 48


class Mark:
    """Lives as long as the node of the graph that holds it."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Mark) -> Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class Tattling(GatedRecurrence):
    """Remembers, weakly, the graphs it built; the marked tensor goes into the outputs and into the state."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Mark]] = []

    def initial_state(self, batch_size: int) -> Any:
        rows = torch.zeros(batch_size, 0, 6)
        return super().initial_state(batch_size) | {"sum": sg.PrefixSum(rows.sum(1)), "rows": sg.Growing(rows)}

    def forward(self, inputs: Tensor, state: Any) -> Any:
        mark = Mark()
        self.seen.append(weakref.ref(mark))
        outputs, following = super().forward(inputs, {"h": state["h"], "position": state["position"]})
        h = Marked.apply(following["h"], mark)
        before, following["sum"] = state["sum"].advance(h)
        rows, following["rows"] = state["rows"].append(h[:, None])
        following["h"] = h
        return outputs + (h + before + rows.sum(1)).sum(-1)[:, None, None], following


def test_between_forward_and_backward_no_graph_is_alive() -> None:
    model = Tattling()
    loss = sg.loss(model, TOKENS, chunk=8)
    # five chunks, and the first once more: its attribute `seen` changed
    assert [ref() for ref in model.seen] == [None] * 6
    loss.backward()
    assert [ref() for ref in model.seen] == [None] * 11


def test_evaluate_builds_no_graph() -> None:
    modes: list[bool] = []
    model = GatedRecurrence()
    model.head.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    sg.evaluate(model, TOKENS, chunk=8)
    assert modes == [False] * 5
    modes.clear()
    # both sweeps alike: torch chooses some kernels by this, and the rebuilt states must have the same bits
    with torch.no_grad():
        sg.backward(model, TOKENS, chunk=8)
    assert modes == [True] * 9
