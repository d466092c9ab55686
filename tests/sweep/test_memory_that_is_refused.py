"""Around a chunk that does not fit: what it drew, what it held, what may not be told back, and a process in need."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import slimgrad as sg
from slimgrad.call.program import Collected
from slimgrad.sweep.progress import Progress
from slimgrad.sweep.random import derive_seed, draw_seed, seeded
from slimgrad.sweep.store import Store
from tests.sweep.refusing import Refuse, Refused, Refuser, Squares, build, its_own, sequence
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

ROOT = Path(__file__).parents[2]
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)]
MODELS = [LinearAttention, GatedRecurrence, CachedAttention, AllKinds]
CHUNK, TIME = 64, 205
TOKENS = sequence(GatedRecurrence, TIME)[0]


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


# --- random draws ---


@pytest.mark.parametrize("kind", [GatedRecurrence, AllKinds])
def test_draws_of_parts_are_those_of_chunks_that_were_asked_for(kind: type[nn.Module], refuse: Refuse) -> None:
    """Seeds go by position. The first chunk fails, and all are halved: as with half the chunk, in every bit."""
    model = build(kind, dropout=0.4)
    torch.manual_seed(5)
    sg.backward(model, TOKENS[:, :192], chunk=32)
    expected = gradients(model)
    refuser = refuse("forward")
    torch.manual_seed(5)
    sg.backward(Refused(model, refuser), TOKENS[:, :192], chunk=64)
    assert refuser.times == 1
    assert all(torch.equal(x, y) for x, y in zip(gradients(model), expected, strict=True))


class LastAlone(Refuser):
    """Memory is short from a position on."""

    def in_forward(self, tokens: int) -> None:
        assert self.progress is not None
        if self.progress.carriers[0].span.start >= 64:
            super().in_forward(tokens)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", [GatedRecurrence, AllKinds])
def test_draws_where_the_first_sweep_cut_in_its_middle(
    kind: type[nn.Module], schedule: sg.Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of the spans it came to, each drawing from the seed of its position: here written out."""
    model, events = build(kind, dropout=0.4), list[sg.Event]()
    refuser = LastAlone("forward", 40)
    original = Progress.bind

    def bind(self: Progress, *arguments: Any) -> Any:
        refuser.progress = self
        return original(self, *arguments)

    monkeypatch.setattr(Progress, "bind", bind)
    torch.manual_seed(5)
    sg.backward(Refused(model, refuser), TOKENS, chunk=CHUNK, schedule=schedule, on_chunk=events.append)
    assert refuser.times == 1
    found = gradients(model)
    spans = sorted((event.start, event.stop) for event in events if event.phase == "reverse")
    assert spans == [(0, 64), (64, 96), (96, 128), (128, 160), (160, 192), (192, 205)]
    torch.manual_seed(5)
    seed, cpu = derive_seed(draw_seed(), 0), torch.device("cpu")
    with seeded(derive_seed(seed, -1), cpu):
        state = model.initial_state(2)
    total, targets = torch.zeros(()), F.pad(TOKENS[:, 1:], (0, 1), value=-100)
    for start, stop in spans:
        with seeded(derive_seed(seed, start), cpu):
            outputs, state = model(TOKENS[:, start:stop], state)
        of_span = targets[:, start:stop].flatten()
        total = total + F.cross_entropy(outputs.flatten(0, 1), of_span, ignore_index=-100, reduction="sum")
    (total / (targets != -100).sum()).backward()
    for x, y in zip(found, gradients(model), strict=True):
        assert float((x - y).norm()) <= 1e-12 * float(y.norm())  # measured 3e-16


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", [GatedRecurrence, AllKinds])
@pytest.mark.parametrize("place", ["reverse", "begins"])
def test_draws_of_a_chunk_that_went_forward_whole_cannot_be_drawn_again(
    kind: type[nn.Module], schedule: sg.Schedule, place: str, refuse: Refuse
) -> None:
    model = Refused(build(kind, dropout=0.4), refuse(place))
    before = its_own(model)
    message = (
        r"^tokens 128 to 191 d.* not fit into memory.* in the reverse sweep, and cannot be taken in parts: the model "
        r"draws random numbers .*dropout.* Use a smaller chunk=, or turn dropout off"
    )
    with pytest.raises(sg.SweepError, match=message):
        sg.backward(model, TOKENS, chunk=CHUNK, schedule=schedule)
    assert its_own(model) == before
    assert gradients(model) == [None] * len(list(model.parameters()))
    model.eval()
    sg.backward(model, TOKENS, chunk=CHUNK, schedule=schedule)
    found = gradients(model)
    sg.backward(model.model, TOKENS, chunk=CHUNK, schedule=schedule)
    for x, y in zip(found, gradients(model), strict=True):
        assert float((x - y).norm()) <= 1e-12 * float(y.norm())


@pytest.mark.parametrize("schedule", [sg.Every(3), sg.Binomial(1)], ids=str)
def test_draws_of_a_chunk_that_is_advanced_again_cannot_be_drawn_in_parts(
    schedule: sg.Schedule, refuse: Refuse
) -> None:
    model = Refused(build(GatedRecurrence, dropout=0.4), refuse("again"))
    with pytest.raises(sg.SweepError, match="cannot be taken in parts: the model draws random numbers"):
        sg.backward(model, torch.cat([TOKENS, TOKENS], 1), chunk=CHUNK, schedule=schedule)
    assert gradients(model) == [None] * len(list(model.parameters()))


# --- what the failed attempt held ---


@pytest.mark.parametrize("place", ["forward", "reverse", "begins", "halfway"])
@pytest.mark.parametrize("kind", [GatedRecurrence, CachedAttention, AllKinds])
def test_nothing_of_a_failed_attempt_is_alive_when_it_is_tried_again(
    kind: type[nn.Module], place: str, refuse: Refuse
) -> None:
    """Not held by the error, and not by a cycle: without the garbage collector."""
    refuser, refs, alive = refuse(place), list[StorageWeakRef](), list[list[bool]]()
    model = Refused(build(kind), refuser)

    def begin(module: nn.Module, inputs: Any) -> None:
        alive.append([not ref.expired() for ref in refs])
        refs.clear()

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        refs.extend(StorageWeakRef(x.untyped_storage()) for x in (*inputs, output))

    model.register_forward_pre_hook(begin)
    model.model.head.register_forward_hook(note)
    gc.collect()
    gc.disable()
    try:
        sg.backward(model, TOKENS[:, :192], chunk=CHUNK)
    finally:
        gc.enable()
    assert refuser.times == 1
    assert len(alive) > 8
    assert all(len(those) == 2 for those in alive[1:])
    assert not any(any(those) for those in alive)


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", ["forward", "reverse"])
def test_kept_states_are_given_back(
    kind: type[nn.Module], place: str, schedule: sg.Schedule, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are taken apart again keep states where others are kept: at the end every row is free."""
    held: list[int] = []
    close = Store.close

    def count(store: Store) -> None:
        held.append(sum(slab.rows.shape[0] - len(slab.free) for slab in store._slabs))
        close(store)

    monkeypatch.setattr(Store, "close", count)
    refuser = refuse(place, 17)
    sg.backward(Refused(build(kind), refuser), TOKENS[:, :192], chunk=CHUNK, schedule=schedule)
    assert refuser.times == 2
    assert len(held) == 2
    assert held == [0, 0]


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Every(2)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", ["forward", "reverse"])
def test_a_segment_is_saved_between_any_two_parts(
    kind: type[nn.Module], place: str, schedule: sg.Schedule, refuse: Refuse, tmp_path: Path
) -> None:
    """Whoever loads it comes to the same bits."""
    refuser = refuse(place, 17)
    model, folders = Refused(build(kind), refuser), list[Path]()

    def save(event: sg.Event) -> None:
        if event.start:  # before the last part nothing is left to save
            folders.append(tmp_path / str(len(folders)))
            segment.save(folders[-1])

    segment = sg.Segment(model, TOKENS[:, :140], chunk=CHUNK, schedule=schedule, on_chunk=save)
    segment.forward()
    segment.reverse()
    expected = gradients(model)
    assert refuser.times >= 2
    assert len(folders) > 12
    for folder in folders:
        segment = sg.Segment.load(folder, model, TOKENS[:, :140])
        segment.forward()
        segment.reverse()
        assert all(torch.equal(x, y) for x, y in zip(gradients(model), expected, strict=True))


# --- errors that are not a chunk's ---


def raise_memory_error(event: sg.Event) -> None:
    raise MemoryError("the caller's own")


@pytest.mark.parametrize("phase", ["forward", "reverse"])
def test_a_memory_error_of_on_chunk_is_its_own(phase: str) -> None:
    """The chunk is over: to take it apart would help nobody."""
    model = build(AllKinds)
    before = its_own(model)
    with pytest.raises(MemoryError, match="the caller's own"):
        sg.backward(model, TOKENS, chunk=CHUNK, on_chunk=lambda e: raise_memory_error(e) if e.phase == phase else None)
    assert its_own(model) == before
    assert gradients(model) == [None] * len(list(model.parameters()))


class Reading:
    """Tokens by spans; of more than `limit` it cannot give so many."""

    def __init__(self, limit: int) -> None:
        self.batch, self.length, self.limit = 2, TIME, limit
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> Tensor:
        self.asked.append((start, stop))
        if stop - start > self.limit:
            raise MemoryError("no room to read")
        return TOKENS[:, start:stop]


def test_a_reader_without_memory_is_asked_for_less() -> None:
    model = build(AllKinds)
    sg.backward(model, TOKENS, chunk=32)
    expected = gradients(model)
    reader = Reading(40)
    sg.backward(model, reader, chunk=CHUNK)
    for x, y in zip(gradients(model), expected, strict=True):
        assert float((x - y).norm()) <= 1e-12 * float(y.norm())
    assert len([1 for start, stop in reader.asked if stop - start > 40]) == 1
    with pytest.raises(sg.MemoryLimitError, match=r"no room to read.*cannot be taken in smaller parts"):
        sg.backward(model, Reading(10), chunk=CHUNK)


@pytest.mark.parametrize("error", [ValueError("not enough memory"), KeyError("x"), RuntimeError("index out of range")])
def test_other_errors_come_out_as_they_are(error: Exception) -> None:
    calls = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(outputs.shape)
        raise error

    with pytest.raises(type(error)) as caught:
        sg.backward(build(AllKinds), TOKENS, chunk=CHUNK, loss_fn=loss_fn)
    assert caught.value is error
    assert len(calls) == 1


# --- when a chunk has been run ---


def fails_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, *, after: bool) -> None:
    """One call of a method raises, before or after it has done its work."""
    original, calls = getattr(owner, name), [0]

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise MemoryError("pretended")
        result = original(self, *arguments, **options)
        if calls[0] == call and after:
            raise MemoryError("pretended")
        return result

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["compare", "settle", "end", "roots"])
@pytest.mark.parametrize("kind", [LinearAttention, AllKinds])
def test_what_fails_when_a_chunk_has_been_run_is_right_or_refused(
    kind: type[nn.Module], name: str, call: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compare, and to stand after a chunk, takes memory as well. What has been added then is not added twice."""
    model = build(kind)
    sg.backward(model, TOKENS[:, :192], chunk=CHUNK // 2)
    expected = gradients(model)
    before = its_own(model)
    # the first look is at the initial state, in no chunk
    fails_at(monkeypatch, Progress, name, call + (name == "compare"), after=after)
    try:
        sg.backward(model, TOKENS[:, :192], chunk=CHUNK)
    except sg.MemoryLimitError:
        assert gradients(model) == [None] * len(expected)
    else:
        for x, y in zip(gradients(model), expected, strict=True):
            assert float((x - y).norm()) <= 1e-12 * float(y.norm())
    assert its_own(model) == before


def test_what_fails_when_an_adjoint_is_put_away_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no parameter has a share in it."""
    model = build(GatedRecurrence).requires_grad_(False)
    start = model.initial_state(2)["h"].clone().requires_grad_()
    fails_at(monkeypatch, Progress, "settle", 3, after=False)
    with pytest.raises(sg.MemoryLimitError, match="tokens 128 to 191 did not fit into memory"):
        sg.backward(model, TOKENS[:, :192], chunk=CHUNK, state=model.initial_state(2) | {"h": start})
    assert start.grad is None


@pytest.mark.parametrize("kind", MODELS)
def test_no_room_for_the_outputs(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as long as the sequence: smaller chunks would not help."""
    model = build(kind)
    fails_at(monkeypatch, Collected, "write", 1, after=False)
    with pytest.raises(sg.MemoryLimitError, match=r"tokens 0 to 63 did not fit into memory \(MemoryError: pretended"):
        sg.outputs(model, TOKENS, chunk=CHUNK)
    sg.outputs(model, TOKENS, chunk=CHUNK)


# --- in need ---

# A matrix of 1,024 x 1,024 float64 numbers is 8.4 MB. Forward a chunk takes two; in the reverse sweep one for each
# layer, and one more forward, two more back; half a chunk a quarter of that. What the process has left over from before
# (up to half a matrix, measured) comes on top of the limits below.
IN_NEED = """
import logging, resource, sys
import torch
import slimgrad as sg
from tests.sweep.refusing import Squares, build

def data_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))

torch.set_num_threads(1)
logging.basicConfig(format="%(message)s", stream=sys.stdout)
layers, matrices, way, path = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
model, tokens = build(Squares, layers=layers), torch.arange(3 * 1024)[None] * 7 % 13

def run(tokens, chunk):
    if way == "backward":
        return sg.backward(model, tokens, chunk=chunk)
    sg.loss(model, tokens, chunk=chunk).backward()

run(tokens[:, :512], 128)  # what is made once
model.zero_grad()
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + int(matrices * 8 * 1024**2), resource.RLIM_INFINITY))
try:
    torch.empty(int((matrices + 1) * 1024**2), dtype=torch.float64)
    raise SystemExit("there is no limit")
except RuntimeError:
    pass
run(tokens, 1024)
torch.save([p.grad for p in model.parameters()], path)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all data on Linux alone")
@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize(
    ("layers", "matrices", "said"),
    [
        (1, 1.5, ["tokens 0 to 1023"]),
        (6, 5, ["tokens 2048 to 3071"]),
        (4, 5.25, ["tokens 2048 to 3071"]),
    ],
    ids=["the first sweep", "the reverse sweep", "a backward pass"],
)
def test_a_process_that_may_not_have_more_memory(
    layers: int, matrices: float, said: list[str], way: str, tmp_path: Path
) -> None:
    """No pretence: what this process computes in whole chunks, that one computes in parts."""
    command = [sys.executable, "-c", IN_NEED, str(layers), str(matrices), way, str(tmp_path / "gradients")]
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | freed_at_once)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" did not fit into memory (RuntimeError: ")[0] for line in lines] == said
    assert all("can't allocate memory" in line and line.endswith("taken in parts from here on") for line in lines)
    model = build(Squares, layers=layers)
    sg.backward(model, torch.arange(3 * 1024)[None] * 7 % 13, chunk=1024)
    for x, y in zip(torch.load(tmp_path / "gradients"), gradients(model), strict=True):
        assert float((x - y).norm()) <= 1e-12 * float(y.norm())
