"""A segment that was saved anywhere and loaded elsewhere comes to the bits of one that was left in peace."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.call.segments import (
    CHUNK,
    MODELS,
    TARGETS,
    TOKENS,
    Biased,
    bits,
    built,
    counted,
    different,
    finished,
    save_and_stop,
    saved_at,
    segment,
)
from tests.contract.contract import fresh_state
from tests.toy_models import Signals

SCHEDULES = {
    "Rebuild": sg.Rebuild(),
    "Rebuild, all on disk": sg.Rebuild(store="disk", rows="disk"),
    "Keep on the host": sg.Keep(store="host", rows="host"),
    "Every on disk": sg.Every(3, store="disk"),
    "Binomial": sg.Binomial(2, rows="disk"),
}


def saved_at_every_step(
    folder: Path, make: Callable[[], nn.Module], *args: Any, scale: Any = None, **options: Any
) -> tuple[list[Path], dict[str, Any]]:
    """Folders saved before, after every chunk of and between both sweeps, and what the gradient came to."""
    folders: list[Path] = []

    def save(_: object = None) -> None:
        folders.append(folder / f"{len(folders):02}")
        one.save(folders[-1])

    model = make()
    one = segment(model, *args, on_chunk=save, **options)
    save()
    one.forward()
    save()
    result = one.reverse(scale)
    return folders, bits(model, result)


# --- everywhere ---


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", MODELS)
def test_saved_at_every_step(kind: str, schedule: str, tmp_path: Path) -> None:
    folders, expected = saved_at_every_step(
        tmp_path, lambda: built(kind), TARGETS, schedule=SCHEDULES[schedule], loss_fn=counted, scale=0.25
    )
    assert len(folders) >= 12  # as many chunks as two sweeps have; more where some are advanced again
    for number, folder in enumerate(folders):
        model = built(kind)
        again = sg.Segment.load(folder, model, TOKENS, TARGETS, loss_fn=counted)
        again.forward()
        result = again.reverse() if number > 6 else again.reverse(0.25)  # once it is under way, as it was
        assert result.schedule == SCHEDULES[schedule]
        assert different(bits(model, result), expected) == [], f"saved at step {number}"


def test_saved_loaded_and_saved_again_after_each_chunk(tmp_path: Path) -> None:
    """Every chunk runs in a life of its own, on a model of its own."""
    expected = built("a mix")
    whole = finished(segment(expected, schedule=sg.Every(3)))
    saved_at(tmp_path, 0, built("a mix"), schedule=sg.Every(3))
    for life in range(5 + 5 + 2):  # the chunks of both sweeps, and those that are advanced again
        save_and_stop(sg.Segment.load(tmp_path, built("a mix"), TOKENS), 1, tmp_path)
        names = [path.name for path in tmp_path.iterdir() if not path.name.startswith("rows-")]
        assert len(names) == 2, life
    model, events = built("a mix"), list[sg.Event]()
    result = finished(sg.Segment.load(tmp_path, model, TOKENS, on_chunk=events.append))
    assert events == []  # nothing was left but to deliver
    assert different(bits(model, result), bits(expected, whole)) == []


def test_saving_does_not_disturb(tmp_path: Path) -> None:
    """The one that is saved goes on as if nothing had been; `.grad` and torch's generator are left alone."""
    expected, model = built("a mix"), built("a mix")
    whole = finished(segment(expected))
    one = segment(model)

    def save(event: sg.Event) -> None:
        state = torch.get_rng_state()
        one.save(tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())

    one.on_chunk = save
    assert different(bits(model, finished(one)), bits(expected, whole)) == []


# --- what comes from outside ---


def test_inputs_that_take_gradients(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return Signals().double()

    def inputs() -> dict[str, Tensor]:
        x = torch.linspace(-1, 1, 2 * 41 * 3, dtype=torch.float64).view(2, 41, 3)
        return {"left": x.clone().requires_grad_(), "right": x.cos().requires_grad_()}

    model, given = make(), inputs()
    whole = finished(sg.Segment(model, given, TARGETS % 5, chunk=CHUNK))
    expected = bits(model, whole)
    for event in range(11):
        model = make()
        one = sg.Segment(model, inputs(), TARGETS % 5, chunk=CHUNK)
        save_and_stop(one, event, tmp_path)
        model, again = make(), inputs()
        result = finished(sg.Segment.load(tmp_path, model, again, TARGETS % 5))
        assert different(bits(model, result), expected) == []
        assert all(torch.equal(again[name].grad, given[name].grad) for name in given)


def test_a_context_takes_its_gradient_and_must_be_the_same(tmp_path: Path) -> None:
    def context(scale: int = 2) -> dict[str, Any]:
        return {"bias": torch.linspace(-1, 1, 13, dtype=torch.float64).requires_grad_(), "scale": scale}

    def make() -> nn.Module:
        torch.manual_seed(3)
        return Biased().double()

    given = context()
    model = make()
    expected = bits(model, finished(segment(model, context=given)))
    for event in (3, 8):
        saved_at(tmp_path, event, make(), context=context())
        model, again = make(), context()
        one = sg.Segment.load(tmp_path, model, TOKENS, context=again)
        assert different(bits(model, finished(one)), expected) == []
        assert torch.equal(again["bias"].grad, given["bias"].grad)
    with pytest.raises(sg.InputError, match=r"context \['scale'\]: 2, now 3"):
        sg.Segment.load(tmp_path, make(), TOKENS, context=context(3))
    other = context()
    other["bias"].data[4] += 1e-9
    with pytest.raises(sg.InputError, match=r"context \['bias'\]: .*bits -?\w+, now .*bits -?\w+"):
        sg.Segment.load(tmp_path, make(), TOKENS, context=other)


@pytest.mark.parametrize("kind", ["sums", "rows", "gates", "a mix"])
def test_a_given_state_need_not_be_given_again(kind: str, tmp_path: Path) -> None:
    """Its gradient is in the result: a graph behind it did not outlive the process."""
    with torch.no_grad():
        _, given = built(kind).eval()(TOKENS[:, :9], built(kind).initial_state(2))
    folders, expected = saved_at_every_step(tmp_path, lambda: built(kind), state=fresh_state(given))
    for folder in folders:
        model = built(kind)
        assert different(bits(model, finished(sg.Segment.load(folder, model, TOKENS))), expected) == []


def test_the_gradient_of_the_final_state_is_saved(tmp_path: Path) -> None:
    gradient = {"sums": torch.linspace(-1, 1, 40, dtype=torch.float64).view(2, 4, 5), "position": None}
    model = built("sums")
    one = segment(model)
    one.forward()
    expected = bits(model, one.reverse(None, gradient))
    one = segment(built("sums"))
    one.forward()

    def stop(event: sg.Event) -> None:
        one.save(tmp_path)
        raise KeyboardInterrupt

    one.on_chunk = stop
    with pytest.raises(KeyboardInterrupt):
        one.reverse(None, gradient)
    model = built("sums")
    again = sg.Segment.load(tmp_path, model, TOKENS)
    assert again.phase == "reverse"
    for arguments in ((0.5,), (None, gradient)):
        with pytest.raises(sg.InputError, match="under way with the gradients it was given; expected none to go on"):
            again.reverse(*arguments)
    assert different(bits(model, again.reverse()), expected) == []


class Projected:
    """A sink that can be saved: two directions of the gradient, added up."""

    def __init__(self) -> None:
        self.basis = torch.linspace(-1, 1, 26, dtype=torch.float64).view(2, 13)
        self.sum = torch.zeros(2, 4, dtype=torch.float64)

    def __call__(self, gradient: Tensor) -> None:
        self.sum = self.sum + self.basis @ gradient

    def state(self) -> dict[str, Tensor]:
        return {"sum": self.sum}

    def load(self, state: dict[str, Tensor]) -> None:
        self.sum = state["sum"]


def test_a_sink_is_saved(tmp_path: Path) -> None:
    whole = Projected()
    assert isinstance(whole, sg.SavedSink)
    finished(segment(built("sums"), sink={"head.weight": whole}))
    for event in range(11):
        saved_at(tmp_path, event, built("sums"), sink={"head.weight": Projected()})
        sink = Projected()
        finished(sg.Segment.load(tmp_path, built("sums"), TOKENS, sink={"head.weight": sink}))
        assert torch.equal(sink.sum, whole.sum)
    for sinks in (None, {"head.weight": Projected(), "head.bias": Projected()}, {"head.bias": Projected()}):
        with pytest.raises(sg.InputError, match=r"sinks: head\.weight, now (none|head\.bias)"):
            sg.Segment.load(tmp_path, built("sums"), TOKENS, sink=sinks)


def test_a_sink_without_state_is_refused_before_the_first_sweep(tmp_path: Path) -> None:
    one = segment(built("sums"), sink={"head.weight": lambda _: None})
    with pytest.raises(sg.InputError, match=r"the sink of head.weight cannot be saved: expected .* state\(\) and load"):
        one.save(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    saved_at(tmp_path, 2, built("sums"), sink={"head.weight": Projected()})
    with pytest.raises(sg.InputError, match=r"the sink of head\.weight cannot be saved"):
        sg.Segment.load(tmp_path, built("sums"), TOKENS, sink={"head.weight": lambda _: None})


# --- states of all sorts ---


class Mood(enum.Enum):
    MAJOR = "major"
    MINOR = object()  # what no file could hold


class Marks(enum.Flag):
    FIRST = 1
    LAST = 2


class Pair(NamedTuple):
    h: Any
    mark: Any


class Marked(nn.Module):
    """A gate beside a Python value that changes from chunk to chunk, in a named tuple."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head, self.values = nn.Embedding(13, 3), nn.Linear(3, 13), values
        self.double()

    def initial_state(self, batch_size: int) -> Pair:
        return Pair(self.head.weight.new_zeros(batch_size, 3), self.values[0])

    def forward(self, inputs: Tensor, state: Pair) -> tuple[Tensor, Pair]:
        y = self.embed(inputs) + state.h[:, None]
        place = next(i for i, value in enumerate(self.values) if value is state.mark or value == state.mark)
        return self.head(y), Pair(0.9 * state.h + y.mean(1), self.values[(place + 1) % len(self.values)])


@pytest.mark.parametrize(
    "values",
    [
        [None, True, 1.5, -0.0, 2**70, float("inf"), 1 + 2j, "text \udc80", b"", b"\x00\xff"],
        [None, (1, ("two", b"3"), (None, Mood.MAJOR)), ()],
        [Mood.MAJOR, Mood.MINOR],
        [None, Mood.MINOR],
        [Marks.FIRST, Marks.FIRST | Marks.LAST, Marks(0)],
        [torch.float16, torch.device("cpu"), None],
    ],
    ids=["plain", "tuples", "enum", "none, then an enum", "flags", "torch's"],
)
@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Every(2)], ids=["Rebuild", "Every"])
def test_python_values(values: list[Any], schedule: sg.Schedule, tmp_path: Path) -> None:
    folders, expected = saved_at_every_step(tmp_path, lambda: Marked(values), schedule=schedule)
    for folder in folders:
        model = Marked(values)
        result = finished(sg.Segment.load(folder, model, TOKENS))
        assert different(bits(model, result), expected) == []


def test_what_no_file_can_hold_is_refused_by_save(tmp_path: Path) -> None:
    class Count(int):
        pass

    for value, said in ((Count(3), "a Count"), (1 << 3000, "a int")):
        one = segment(Marked([value, None]))
        with pytest.raises(sg.InputError, match=rf"state .*mark holds {said}, which cannot be saved"):
            one.save(tmp_path / "nothing")
    given = Pair(torch.zeros(2, 3, dtype=torch.float64), None)
    one = segment(Marked([None]), state=given)
    with pytest.raises(sg.InputError, match=r"state= cannot be saved: expected dicts .* got .*Pair"):
        one.save(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
