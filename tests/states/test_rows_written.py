"""Rows of a cache are read again by every later chunk and on the way back: who writes to them is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.contract.contract import collect, plain, worst_error

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
BY_THE_MODEL = (
    r"rows of a Growing were written to in place in tokens \d+ to \d+, by the model or by loss_fn.*rows\.clone"
)
BETWEEN = r"state .*: rows of a Growing were written to in place between two chunks, or between the sweeps"
Write = Callable[[Tensor], Any]


class Attention(nn.Module):
    """Over all rows so far; `write` is what it does to them first."""

    def __init__(self, write: Write | None = None, *, last: int | None = None) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(13, 6), nn.Linear(6, 6), nn.Linear(6, 13)
        self.write, self.last, self.seen = write, last, list[Tensor]()
        self.double()

    def initial_state(self, batch_size: int) -> sg.Growing:
        return sg.Growing(self.head.weight.new_zeros(batch_size, 0, 6))

    def rows(self, x: Tensor, state: sg.Growing) -> tuple[Tensor, Tensor, sg.Growing]:
        rows, following = state.append(x, last=None if self.last is None else self.last + x.shape[1])
        if self.write is not None:
            self.write(rows)
        reach = torch.arange(rows.shape[1]) - rows.shape[1] + x.shape[1]
        visible = reach <= torch.arange(x.shape[1])[:, None]
        scores = (x @ rows.transpose(1, 2)).masked_fill(~visible, -torch.inf)
        return torch.tanh(x + scores.softmax(-1) @ rows), rows, following

    def forward(self, inputs: Tensor, state: sg.Growing) -> tuple[Any, sg.Growing]:
        y, _, following = self.rows(self.mix(self.embed(inputs)), state)
        return self.head(y), following


class WithRows(Attention):
    """The new rows are among the outputs."""

    def forward(self, inputs: Tensor, state: sg.Growing) -> tuple[Any, sg.Growing]:
        y, rows, following = self.rows(self.mix(self.embed(inputs)), state)
        return {"y": self.head(y), "rows": rows[:, -inputs.shape[1] :]}, following


def reversed_segment(model: nn.Module, **options: Any) -> None:
    segment = sg.Segment(model, TOKENS, chunk=7, **options)
    segment.forward()
    segment.reverse()


WAYS: dict[str, Callable[..., Any]] = {
    "backward": lambda model, **o: sg.backward(model, TOKENS, chunk=7, **o),
    "loss": lambda model, **o: sg.loss(model, TOKENS, chunk=7, **o).backward(),
    "segment": reversed_segment,
    "evaluate": lambda model, schedule=None, **o: sg.evaluate(model, TOKENS, chunk=7, **o),
}
WRITES: dict[str, Write] = {
    "the same each time": lambda rows: rows.masked_fill_(rows.abs() > 0.5, 0),
    "other each time": lambda rows: rows.mul_(0.5),
    "a part, without gradients": lambda rows: rows.detach()[:, -1:].clamp_(-0.1, 0.1),
}


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_writes_to_its_rows(way: str, write: str, place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = "device" if place == "device" else tmp_path
    for schedule in (sg.Rebuild(rows=rows), sg.Every(2, rows=rows), sg.Rebuild(tape=2, rows=rows)):
        model = Attention(WRITES[write])
        with pytest.raises(sg.ModelError, match=BY_THE_MODEL):
            WAYS[way](model, schedule=schedule)
        assert all(p.grad is None for p in model.parameters())


def test_without_versions_of_the_tensors() -> None:
    """Inference tensors have none."""
    with torch.inference_mode(), pytest.raises(sg.ModelError, match=BY_THE_MODEL):
        sg.evaluate(Attention(WRITES["other each time"]), TOKENS, chunk=7)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_writes_to_rows_among_the_outputs(way: str, detached: bool) -> None:
    def loss_fn(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        rows = outputs["rows"].detach() if detached else outputs["rows"]
        written = rows.clamp_(-0.1, 0.1)
        return outputs["y"].square().sum() + written.square().sum()

    torch.manual_seed(0)
    with pytest.raises(sg.ModelError, match=BY_THE_MODEL):
        WAYS[way](WithRows(), loss_fn=loss_fn)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_a_model_keeps_and_writes_to_later(way: str, before: bool) -> None:
    class Keeping(Attention):
        def forward(self, inputs: Tensor, state: sg.Growing) -> tuple[Any, sg.Growing]:
            if before and kept:
                kept[-1].detach()[:, :1].zero_()
            outputs, following = super().forward(inputs, state)
            if not before and len(kept) > 1:
                kept[-2].detach()[:, :1].zero_()
            return outputs, following

    torch.manual_seed(0)
    kept: list[Tensor] = []
    with pytest.raises(sg.ModelError, match=BY_THE_MODEL):
        WAYS[way](Keeping(kept.append), schedule=sg.Rebuild())


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Keep(), sg.Rebuild(tape=2), sg.Rebuild(tape=9)], ids=str)
@pytest.mark.parametrize("chunk", [7, 40])
def test_the_state_of_a_segment(chunk: int, schedule: sg.Schedule, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention()
    segment = sg.Segment(model, TOKENS, chunk=chunk, schedule=schedule)
    segment.forward().value.zero_()
    with pytest.raises(sg.ConsumedError, match=BETWEEN):
        segment.save(tmp_path)
    with pytest.raises(sg.ConsumedError, match=BETWEEN):
        segment.reverse()
    assert all(p.grad is None for p in model.parameters())
    assert not list(tmp_path.iterdir())


def test_rows_that_are_written_to_from_on_chunk() -> None:
    torch.manual_seed(0)
    kept: list[Tensor] = []

    def on_chunk(event: sg.Event) -> None:
        if event.phase == "reverse" and event.start == 21:
            kept[-1].detach()[:, :1].zero_()

    with pytest.raises(sg.ConsumedError, match=BETWEEN):
        sg.backward(Attention(kept.append), TOKENS, chunk=7, schedule=sg.Rebuild(), on_chunk=on_chunk)


@pytest.mark.parametrize("last", [None, 3])
def test_whoever_clones_them_may_write(last: int | None) -> None:
    class Cloning(Attention):
        def rows(self, x: Tensor, state: sg.Growing) -> tuple[Tensor, Tensor, sg.Growing]:
            y, rows, following = super().rows(x, state)
            return y + rows.clone().mul_(0.5)[:, -x.shape[1] :], rows, following

    torch.manual_seed(0)
    model = Cloning(last=last)
    expected = {n: g for n, g in plain(model, TOKENS, None)[1].items() if not n.startswith("state")}
    segment = sg.Segment(model, TOKENS, chunk=7)
    state = segment.forward()
    segment.reverse()
    state.value.zero_()  # the gradient is there: the caller's own
    if last is None:
        error, name = worst_error(collect(model, None, None), expected)
        assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured at most 6e-16
