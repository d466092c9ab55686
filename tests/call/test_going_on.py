"""A backward pass that fails half way through the parameters: a segment goes on from where it was saved last."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.call.segments import finished
from tests.contract.contract import collect, worst_error
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

CHUNK, CHUNKS = 64, 5
TOKENS = torch.arange(2 * CHUNK * CHUNKS).reshape(2, -1) * 7 % 11
MODELS = {"sums": LinearAttention, "rows": CachedAttention, "gates": GatedRecurrence, "a mix": AllKinds}
# In parts of half a chunk and less, against whole ones: measured, at most 4e-16
EXACT = 1e-12


class Fails(torch.autograd.Function):
    """Passes through; raises on the way back, where the head has its share already and the embedding has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, now: Callable[[int], bool]) -> Tensor:
        ctx.now, ctx.tokens = now, x.shape[1]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        if ctx.now(ctx.tokens):
            raise torch.OutOfMemoryError("no room for the embedding's gradient")
        return grad_outputs[0], None


def built(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[kind]().double()


def failing(model: nn.Module, now: Callable[[int], bool]) -> nn.Module:
    """The model with a backward pass that fails where `now` says so of a number of tokens."""
    model.embed.register_forward_hook(lambda module, args, output: Fails.apply(output, now))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return collect(model, None, None)


def expected(kind: str) -> dict[str, Tensor]:
    model = built(kind)
    sg.backward(model, TOKENS, chunk=CHUNK)
    return gradients(model)


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("saved_at", ["new", "forward", "swept", "reverse"])
def test_it_goes_on_in_smaller_parts(
    kind: str, schedule: sg.Schedule, saved_at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[sg.Event] = []
    most = CHUNK  # tokens whose backward pass has room: all, until the middle of the reverse sweep; then a quarter

    def on_chunk(event: sg.Event) -> None:
        nonlocal most
        events.append(event)
        if (one.phase, event.stop) in (("forward", 2 * CHUNK), ("reverse", 5 * CHUNK)) and one.phase == saved_at:
            one.save(tmp_path)
        if event.phase == "reverse" and event.start <= 3 * CHUNK:
            most = CHUNK // 4

    model = failing(built(kind), lambda tokens: tokens > most)
    one = sg.Segment(model, TOKENS, chunk=CHUNK, schedule=schedule, on_chunk=on_chunk)
    if saved_at == "new":
        one.save(tmp_path)
    one.forward()
    if saved_at == "swept":
        one.save(tmp_path)
    with caplog.at_level(logging.WARNING, "slimgrad"):
        result = one.reverse()
    error, name = worst_error(gradients(model), expected(kind))
    assert error < EXACT, name
    # in halves, then in quarters; where the first sweep could be cut finer again, it took quarters by itself
    tries = sum(f"going on from {tmp_path}" in record.message for record in caplog.records)
    assert tries == (1 if saved_at in ("new", "forward") else 2)
    assert min(e.stop - e.start for e in events if e.phase == "reverse") == CHUNK // 4
    assert result.num_targets == 2 * (CHUNK * CHUNKS - 1)


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_save_the_gradients_are_as_they_were(kind: str) -> None:
    most = CHUNK

    def on_chunk(event: sg.Event) -> None:
        nonlocal most
        most = CHUNK // 2 if event.phase == "reverse" else CHUNK

    model = failing(built(kind), lambda tokens: tokens > most)
    one = sg.Segment(model, TOKENS, chunk=CHUNK, on_chunk=on_chunk)
    with pytest.raises(sg.MemoryLimitError, match=r"save a slimgrad\.Segment on the way"):
        finished(one)
    assert all(p.grad is None for p in model.parameters())
    assert one.phase == "closed"


def test_what_can_never_fit_is_given_up(tmp_path: Path) -> None:
    """Parts are halved down to a floor; then the error is the caller's."""
    armed, failures = False, 0

    def now(tokens: int) -> bool:
        nonlocal failures
        failures += armed
        return armed

    def on_chunk(event: sg.Event) -> None:
        nonlocal armed
        armed = armed or event.phase == "reverse"

    model = failing(built("gates"), now)
    one = sg.Segment(model, TOKENS, chunk=CHUNK, on_chunk=on_chunk)
    one.save(tmp_path)
    with pytest.raises(sg.MemoryLimitError):
        finished(one)
    assert 1 < failures < 10
    assert all(p.grad is None for p in model.parameters())
    armed = False  # room again: what was saved is as good as it was
    again = failing(built("gates"), now)
    finished(sg.Segment.load(tmp_path, again, TOKENS))
    error, name = worst_error(gradients(again), expected("gates"))
    assert error < EXACT, name


def test_the_sink_goes_back_as_well(tmp_path: Path) -> None:
    """What it took since the save was taken for nothing."""

    class Sum:
        def __init__(self) -> None:
            self.sum = torch.zeros((), dtype=torch.float64)

        def __call__(self, gradient: Tensor) -> None:
            self.sum = self.sum + gradient

        def state(self) -> dict[str, Tensor]:
            return {"sum": self.sum}

        def load(self, state: dict[str, Tensor]) -> None:
            self.sum = state["sum"]

    most, sink = CHUNK, Sum()

    def on_chunk(event: sg.Event) -> None:
        nonlocal most
        if event.phase == "reverse" and event.stop == 5 * CHUNK:
            one.save(tmp_path)
        if event.phase == "reverse" and event.start == 2 * CHUNK:
            most = CHUNK // 2

    model = failing(built("gates"), lambda tokens: tokens > most)
    one = sg.Segment(model, TOKENS, chunk=CHUNK, on_chunk=on_chunk, sink={"head.weight": sink})
    finished(one)
    found = gradients(model) | {"head.weight": sink.sum}
    error, name = worst_error(found, expected("gates"))
    assert error < EXACT, name


def test_draws_that_would_come_out_otherwise_are_refused(tmp_path: Path) -> None:
    """The chunk went forward whole; in parts dropout would draw other numbers."""
    most = CHUNK

    def on_chunk(event: sg.Event) -> None:
        nonlocal most
        most = CHUNK // 2 if event.phase == "reverse" else CHUNK

    torch.manual_seed(3)
    model = failing(GatedRecurrence(dropout=0.1).double(), lambda tokens: tokens > most)
    one = sg.Segment(model, TOKENS, chunk=CHUNK, on_chunk=on_chunk)
    one.forward()
    one.save(tmp_path)
    with pytest.raises(sg.SweepError, match="draws random numbers"):
        one.reverse()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Every(2)], ids=str)
@pytest.mark.parametrize("sweep", ["first", "second"])
@pytest.mark.parametrize("kind", MODELS)
def test_saved_between_the_parts_of_a_chunk(kind: str, sweep: str, schedule: sg.Schedule, tmp_path: Path) -> None:
    """Cut in the first sweep, in which bits are compared, or in the second, from states that are kept for it."""
    one: sg.Segment | None = None

    def refuse(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        keeps_a_graph = torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        if args[0].shape[1] > 20 and (keeps_a_graph if sweep == "second" else one and one.phase == "forward"):
            raise MemoryError("too many tokens")

    def limited() -> nn.Module:
        model = built(kind)
        model.embed.register_forward_pre_hook(refuse)
        return model

    events, folders = list[sg.Event](), list[Path]()

    def save(event: sg.Event) -> None:
        events.append(event)
        if len(events) % 3 == 0:
            folders.append(tmp_path / str(len(events)))
            one.save(folders[-1])

    model = limited()
    one = sg.Segment(model, TOKENS, chunk=CHUNK, schedule=schedule, on_chunk=save)
    finished(one)
    whole = gradients(model)
    assert max(event.stop - event.start for event in events if event.phase == "reverse") == 16
    error, name = worst_error(whole, expected(kind))
    assert error < EXACT, name
    for folder in folders:
        model = limited()
        one = sg.Segment.load(folder, model, TOKENS)
        finished(one)
        found = gradients(model)
        assert [name for name, g in whole.items() if not torch.equal(g, found[name])] == [], folder.name
