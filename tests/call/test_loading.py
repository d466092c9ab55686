"""A saved segment is loaded for what it was saved of, and for nothing else: the error says what differs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.call.saving import read_document
from tests.call.segments import CHUNK, TARGETS, TOKENS, bits, built, counted, different, finished, saved_at, segment
from tests.toy_models import GatedRecurrence, Signals


def changed(change: Callable[[nn.Module], Any], kind: str = "gates") -> nn.Module:
    model = built(kind)
    with torch.no_grad():
        change(model)
    return model


def nudge(x: Tensor) -> None:
    x.view(-1)[1] += 1e-12


# --- the model, and what goes with it ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: nudge(m.gate.weight), r"parameter gate\.weight: torch\.float64 \[6, 6\] trainable, bits "),
        (lambda m: m.gate.weight.requires_grad_(False), r"parameter gate\.weight: .* trainable, .* now .*\], bits"),
        (lambda m: m.float(), r"parameter start: torch\.float64 \[6\] .* now torch\.float32 .*; and \d+ more|float32"),
        (lambda m: m.eval(), "training modes: ttttttt?, now eeeeee"),
        (lambda m: m.register_buffer("extra", torch.ones(2)), r"buffer extra: absent, now torch\.float32 \[2\]"),
        (lambda m: delattr(m, "dropout"), "training modes"),
    ],
    ids=["a weight", "frozen", "dtype", "mode", "a buffer more", "a module less"],
)
def test_another_model(change: Callable[[nn.Module], Any], message: str, tmp_path: Path) -> None:
    saved_at(tmp_path, 7, built("gates"))
    with pytest.raises(sg.InputError, match=message):
        sg.Segment.load(tmp_path, changed(change), TOKENS)


def test_another_buffer(tmp_path: Path) -> None:
    def make() -> Signals:
        torch.manual_seed(3)
        return Signals().double()

    x = torch.randn(2, 41, 3, dtype=torch.float64)
    inputs = {"left": x, "right": x}
    sg.Segment(make(), inputs, TARGETS % 5, chunk=CHUNK).save(tmp_path)
    model = make()
    nudge(model.scale)
    with pytest.raises(sg.InputError, match=r"buffer scale: torch\.float64 \[4\], bits"):
        sg.Segment.load(tmp_path, model, inputs, TARGETS % 5)


def test_of_many_differences_ten_are_shown(tmp_path: Path) -> None:
    saved_at(tmp_path, 7, built("gates"))
    with pytest.raises(sg.InputError, match=r"gate\.bias.*; and \d+ more\. Expected the same"):
        sg.Segment.load(tmp_path, built("a mix"), TOKENS)


@pytest.mark.parametrize("kind", ["a number", "in a list", "a class"])
def test_a_model_that_is_another_with_the_same_weights(tmp_path: Path, kind: str) -> None:
    """What is neither a parameter nor a buffer: an attribute, the first state, the class."""

    class Begins(GatedRecurrence):
        def __init__(self) -> None:
            super().__init__()
            self.begin = [0.0] if kind == "in a list" else 0.0

        def initial_state(self, batch_size: int) -> dict[str, Tensor]:
            begin = self.begin[0] if isinstance(self.begin, list) else self.begin
            return super().initial_state(batch_size) | {"h": self.start.expand(batch_size, -1) + begin}

    class Other(Begins):
        pass

    def make() -> Begins:
        torch.manual_seed(3)
        return Begins().double()

    one = sg.Segment(make(), TOKENS, chunk=CHUNK)
    one.forward()
    one.save(tmp_path)
    model = Other().double() if kind == "a class" else make()
    model.load_state_dict(make().state_dict())
    message = r"the model makes another initial state .* \(\['h'\]\)"
    if kind == "in a list":
        model.begin = [1e-9]
    elif kind == "a number":
        model.begin, message = 1e-9, "attribute begin: 0.0, now 1e-09"
    else:
        message = r"module \(the model\): .*Begins, now .*Other"
    with pytest.raises(sg.InputError, match=message):
        sg.Segment.load(tmp_path, model, TOKENS)


def other_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return counted(outputs, targets)["loss"]


class Loss:
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return counted(outputs, targets)["loss"]


def test_the_loss_function_is_known_by_its_name(tmp_path: Path) -> None:
    saved_at(tmp_path, 3, built("sums"), loss_fn=counted)
    for loss, name in ((None, "cross_entropy_sum"), (other_loss, "other_loss"), (Loss(), "Loss")):
        with pytest.raises(sg.InputError, match=rf"loss function: tests\.\S+\.counted, now \S+\.{name}"):
            sg.Segment.load(tmp_path, built("sums"), TOKENS, loss_fn=loss)
    finished(sg.Segment.load(tmp_path, built("sums"), TOKENS, loss_fn=counted))
    saved_at(tmp_path, 3, built("sums"), loss_fn=Loss())
    finished(sg.Segment.load(tmp_path, built("sums"), TOKENS, loss_fn=Loss()))  # another object of the same type


# --- the software ---


@pytest.mark.parametrize(
    ("change", "back", "message"),
    [
        (partial(torch.set_num_threads, 2), partial(torch.set_num_threads, 1), "threads: 1, now 2"),
        (
            partial(torch.use_deterministic_algorithms, True),
            partial(torch.use_deterministic_algorithms, False),
            "deterministic algorithms: False, now True",
        ),
        (
            partial(torch.set_float32_matmul_precision, "high"),
            partial(torch.set_float32_matmul_precision, "highest"),
            "float32 matmul precision: highest, now high",
        ),
        (
            partial(torch.set_default_dtype, torch.float64),
            partial(torch.set_default_dtype, torch.float32),
            r"default dtype: torch\.float32, now torch\.float64",
        ),
    ],
    ids=["threads", "deterministic", "precision", "dtype"],
)
def test_other_settings(change: Callable[[], None], back: Callable[[], None], message: str, tmp_path: Path) -> None:
    saved_at(tmp_path, 7, built("gates"))
    model = built("gates")
    change()
    try:
        with pytest.raises(sg.InputError, match=message):
            sg.Segment.load(tmp_path, model, TOKENS)
    finally:
        back()


def test_another_autocast(tmp_path: Path) -> None:
    saved_at(tmp_path, 7, built("float32"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(sg.InputError, match=r"autocast: .*False.*now .*True"):
        sg.Segment.load(tmp_path, built("float32"), TOKENS)


@pytest.mark.parametrize("name", ["torch.__version__", "slimgrad.__version__"])
def test_another_version(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved_at(tmp_path, 7, built("gates"))
    monkeypatch.setattr(name, "0.0.7")
    with pytest.raises(sg.InputError, match=rf"{name.partition('.')[0]}: \S+, now 0\.0\.7"):
        sg.Segment.load(tmp_path, built("gates"), TOKENS)


# --- the sequence ---


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[:, :-1], "sequence: batch 2, 41 tokens, now batch 2, 40 tokens"),
        (TOKENS[:1], "sequence: batch 2, 41 tokens, now batch 1, 41 tokens"),
    ],
    ids=["length", "batch"],
)
def test_a_sequence_of_another_shape(tokens: Tensor, message: str, tmp_path: Path) -> None:
    saved_at(tmp_path, 7, built("gates"))
    with pytest.raises(sg.InputError, match=message):
        sg.Segment.load(tmp_path, built("gates"), tokens)


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Every(2)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("where", range(5))
@pytest.mark.parametrize("what", ["inputs", "targets"])
def test_other_values_are_found_as_they_are_read(what: str, where: int, schedule: sg.Schedule, tmp_path: Path) -> None:
    """Saved between the sweeps: each chunk is still to be read once more."""
    one = segment(built("gates"), TARGETS, schedule=schedule)
    one.forward()
    one.save(tmp_path)
    given = {"inputs": TOKENS.clone(), "targets": TARGETS.clone()}
    given[what][1, CHUNK * where + 3] = 5 if int(given[what][1, CHUNK * where + 3]) != 5 else 6
    model = built("gates")
    again = sg.Segment.load(tmp_path, model, given["inputs"], given["targets"])
    with pytest.raises(sg.ConsumedError, match=rf"{what}, tokens {CHUNK * where} to \d+: other values were read"):
        again.reverse()
    assert all(p.grad is None for p in model.parameters())


def test_what_has_been_reversed_is_not_read_again(tmp_path: Path) -> None:
    """Saved when three of five chunks are done: a reader that has lost them can finish all the same."""
    expected = built("gates")
    whole = finished(segment(expected))
    saved_at(tmp_path, 5 + 3, built("gates"))
    tokens = TOKENS.clone()
    tokens[:, 2 * CHUNK + 1 :] = 0  # one more is kept: it is the target of the last that is left
    model = built("gates")
    result = finished(sg.Segment.load(tmp_path, model, tokens))
    assert different(bits(model, result), bits(expected, whole)) == []


def test_inputs_that_take_gradients_must_go_on_to(tmp_path: Path) -> None:
    x = torch.randn(2, 41, 3, dtype=torch.float64)
    one = sg.Segment(Signals().double(), {"left": x, "right": x}, TARGETS % 5, chunk=CHUNK)
    one.save(tmp_path)
    inputs = {"left": x, "right": x.clone().requires_grad_()}
    with pytest.raises(sg.InputError, match=r"inputs that take gradients: \[\], now \[1\]"):
        sg.Segment.load(tmp_path, one._call.model, inputs, TARGETS % 5)


def test_readers_are_counted_once(tmp_path: Path) -> None:
    """Whoever asked for the number of targets in the middle of the first sweep had them read to the end."""

    class Reader:
        batch, length = 2, 41

        def __init__(self, tokens: Tensor) -> None:
            self.tokens = tokens

        def read(self, start: int, stop: int) -> Tensor:
            return self.tokens[:, start:stop]

    expected = built("gates")
    whole = finished(segment(expected, TARGETS))
    for event in (2, 5, 7):
        model = built("gates")
        torch.manual_seed(5)
        one = sg.Segment(model, Reader(TOKENS), Reader(TARGETS), chunk=CHUNK)
        count = 0

        def on_chunk(_: sg.Event, one: sg.Segment = one, event: int = event) -> None:
            nonlocal count
            count += 1
            assert one.num_targets == 80
            if count == event:
                one.save(tmp_path)
                raise KeyboardInterrupt

        one.on_chunk = on_chunk
        with pytest.raises(KeyboardInterrupt):
            finished(one)
        model = built("gates")
        again = sg.Segment.load(tmp_path, model, Reader(TOKENS), Reader(TARGETS))
        assert again.num_targets == 80
        assert different(bits(model, finished(again)), bits(expected, whole)) == []


# --- the process ---

PROGRAM = """
import sys
from pathlib import Path
import torch
import tests.call.segments as s
import slimgrad as sg
torch.set_num_threads(1)
folder, load = Path(sys.argv[1]), sys.argv[2] == "load"
model = s.built("a mix")
if load:
    one = sg.Segment.load(folder, model, s.TOKENS, s.TARGETS, loss_fn=s.counted)
else:
    s.saved_at(folder, 8, model, s.TARGETS, loss_fn=s.counted)
    model = s.built("a mix")
    one = s.segment(model, s.TARGETS, loss_fn=s.counted)
torch.save(s.bits(model, s.finished(one)), folder / f"{sys.argv[3]}.pt")
"""


def test_nothing_depends_on_a_salted_hash(tmp_path: Path) -> None:
    """Saved by processes with two salts, for the same model; loaded by one with a third, to the same bits."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def run(salt: int, folder: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", PROGRAM, str(folder), *arguments]
        subprocess.run(command, check=True, timeout=120, env={**environment, "PYTHONHASHSEED": str(salt)})

    for salt in (1, 2):
        run(salt, tmp_path / str(salt), "save", "whole")
    run(3, tmp_path / "1", "load", "rest")
    identities = [read_document(tmp_path / salt)[0]["identity"] for salt in ("1", "2")]
    assert list(identities[0].items()) == list(identities[1].items())  # in the same order too
    found = [torch.load(tmp_path / path, weights_only=False) for path in ("1/whole.pt", "2/whole.pt", "1/rest.pt")]
    assert different(found[1], found[0]) == different(found[2], found[0]) == []
