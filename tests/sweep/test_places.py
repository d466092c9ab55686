"""Wherever kept states and rows lie, a gradient has the same bits, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.sweep.files import ScratchFile
from slimgrad.sweep.run import Run
from slimgrad.sweep.store import Handle, Store
from tests.sweep.opened import open_files, wait_for_threads
from tests.sweep.refusing import Refuse, Refused
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(2 * 82).reshape(2, 82) * 7 % 13
CHUNK = 16  # chunks of 16 and, at the end, of 2
PLACES = ["host", "disk", "folder"]
SCHEDULES = [sg.Rebuild, sg.Keep, lambda **places: sg.Every(2, **places), lambda **places: sg.Binomial(2, **places)]


def named(place: str, folder: Path) -> str | Path:
    return folder if place == "folder" else place


def found(model: nn.Module, schedule: sg.Schedule, **options: Any) -> list[Tensor]:
    """Everything that a call comes to."""
    result = sg.backward(model, TOKENS, chunk=CHUNK, schedule=schedule, **options)
    leaves = [*pytree.tree_leaves(result.final_state), *pytree.tree_leaves(result.initial_state_grad)]
    values = [getattr(leaf, "value", leaf) for leaf in leaves]
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [result.loss, *gradients, *(x for x in values if isinstance(x, Tensor))]


def require_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("slimgrad-store")]


# --- the same bits ---


@pytest.mark.parametrize("rows", ["device", *PLACES])
@pytest.mark.parametrize("store", ["device", *PLACES])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [CachedAttention, AllKinds, GatedRecurrence])
def test_a_place_moves_no_bit(kind: type[nn.Module], schedule: Any, store: str, rows: str, tmp_path: Path) -> None:
    model, places = kind(), {"store": named(store, tmp_path), "rows": named(rows, tmp_path)}
    require_same(found(model, schedule(**places)), found(model, schedule()))
    assert list(tmp_path.iterdir()) == []
    assert readers() == []


@pytest.mark.parametrize("rows", PLACES)
def test_whoever_owns_the_loss(rows: str, tmp_path: Path) -> None:
    model = AllKinds()

    def run(schedule: sg.Schedule) -> list[Tensor]:
        outputs = sg.outputs(model, TOKENS, chunk=CHUNK, schedule=schedule)
        outputs.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
        return [outputs, *gradients]

    require_same(run(sg.Binomial(2, store=named(rows, tmp_path), rows=named(rows, tmp_path))), run(sg.Binomial(2)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_rows_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(13, 3, dtype=dtype) * 0.3)

        def initial_state(self, batch_size: int) -> sg.Growing:
            return sg.Growing(torch.ones(batch_size, 1, 3, dtype=dtype))

        def forward(self, inputs: Tensor, state: sg.Growing) -> tuple[Tensor, sg.Growing]:
            rows, following = state.append(self.table[inputs])
            return (self.table[inputs] @ rows.mean(1)[..., None]).abs().square(), following

    def run(schedule: sg.Schedule) -> list[Tensor]:
        outputs = sg.outputs(model, TOKENS, chunk=CHUNK, schedule=schedule)
        outputs.float().sum().backward()
        gradient, model.table.grad = model.table.grad, None
        return [outputs, gradient]

    model = Rows()
    require_same(run(sg.Rebuild(rows=tmp_path)), run(sg.Rebuild()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_state_that_goes_on_from_rows_elsewhere(place: str, tmp_path: Path) -> None:
    """It outlives the file."""
    model = CachedAttention()
    expected = sg.backward(model, TOKENS[:, :40], chunk=CHUNK).final_state
    schedule = sg.Rebuild(rows=named(place, tmp_path))
    state = sg.backward(model, TOKENS[:, :40], chunk=CHUNK, schedule=schedule).final_state
    assert list(tmp_path.iterdir()) == []
    model.zero_grad()
    one, other = (found(model, sg.Rebuild(), state=x) for x in (state, expected))
    require_same(one, other)


@pytest.mark.parametrize("kind", [CachedAttention, AllKinds])
@pytest.mark.parametrize("place", ["forward", "reverse"])
def test_parts_of_a_chunk_with_everything_on_disk(
    kind: type[nn.Module], place: str, refuse: Refuse, tmp_path: Path
) -> None:
    model = kind().double()
    expected = found(model, sg.Every(2))
    refuser = refuse(place, 40)
    sg.backward(Refused(model, refuser), TOKENS, chunk=41, schedule=sg.Every(2, store=tmp_path, rows=tmp_path))
    assert refuser.times == 1
    for x, p in zip(expected[1:], model.parameters(), strict=False):
        assert float((x - p.grad).norm()) <= 1e-12 * float(x.norm())  # measured 4e-16
    assert list(tmp_path.iterdir()) == []


# --- files ---


def test_rows_lie_in_the_folder_while_needed(tmp_path: Path) -> None:
    """And where they do, nothing of them is held elsewhere: two buffers as long as the sequence."""
    sizes: list[int] = []

    def look(event: sg.Event) -> None:
        sizes.append(sum(os.fstat(file).st_size for file in open_files(tmp_path)))

    sg.backward(CachedAttention(), TOKENS, chunk=CHUNK, schedule=sg.Rebuild(rows=tmp_path), on_chunk=look)
    rows = 2 * 2 * 82 * 6 * 4  # keys and values, batch, time, width, bytes
    assert sizes[0] >= rows
    assert max(sizes) >= 2 * rows
    assert max(sizes) <= 4 << 18  # whole blocks
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("phase", ["forward", "reverse"])
def test_files_of_rows_go_after_an_error(phase: str, tmp_path: Path) -> None:
    def stop(event: sg.Event) -> None:
        if event.phase == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sg.backward(AllKinds(), TOKENS, chunk=CHUNK, schedule=sg.Keep(store=tmp_path, rows=tmp_path), on_chunk=stop)
    assert list(tmp_path.iterdir()) == []
    assert readers() == []


def test_files_of_rows_go_with_a_loss_that_nobody_calls_backward_on(tmp_path: Path) -> None:
    loss = sg.loss(AllKinds(), TOKENS, chunk=CHUNK, schedule=sg.Keep(store=tmp_path, rows=tmp_path))
    assert len(open_files(tmp_path)) == 2
    del loss
    wait_for_threads()
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_no_room_for_rows(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first buffers, and then those of the gradients: wherever the disk is full, the call stops and says so."""
    reserve, calls = os.posix_fallocate, []

    def full(descriptor: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = CachedAttention()
    message = (
        rf"{tmp_path}: expected to reserve [\d,]+ bytes for .* got: No space left on device\. Name a folder with more"
    )
    with pytest.raises(sg.StorageError, match=message):
        sg.backward(model, TOKENS, chunk=CHUNK, schedule=sg.Rebuild(rows=tmp_path))
    assert len(calls) == number
    assert all(p.grad is None for p in model.parameters())
    assert list(tmp_path.iterdir()) == []


NO_ROOM = """
import pathlib, resource, sys, torch, slimgrad as sg
from tests.toy_models import CachedAttention
folder = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))  # of one file
model, tokens = CachedAttention(width=64), torch.randint(0, 13, (1, 8192))
try:  # keys of 256 bytes: 2 MiB, and as many of values
    sg.backward(model, tokens, chunk=256, schedule=sg.Rebuild(rows=folder))
except sg.StorageError as error:
    print(error)
assert all(p.grad is None for p in model.parameters())
assert not list(folder.iterdir())
sg.backward(model, tokens[:, :2048], chunk=256, schedule=sg.Rebuild(rows=folder))
assert all(p.grad is not None for p in model.parameters())
assert not list(folder.iterdir())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE, and files that are reserved before they are mapped")
def test_a_file_that_may_really_not_be_so_long(tmp_path: Path) -> None:
    """In a process of its own, which a write through the map would kill."""
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "expected to reserve 2," in done.stdout
    assert "got: File too large" in done.stdout


# --- fetched ahead ---


class Watched:
    """What a store is asked for, between the chunks that run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, Any]] = []
        fetch, get, reverse, advance = Store.fetch, Store.get, Run._reverse, Run._advance

        def on_fetch(store: Store, handle: Handle) -> None:
            if handle not in store._coming:
                self.log.append(("fetch", handle))
            fetch(store, handle)

        def on_get(store: Store, handle: Handle) -> Tensor:
            self.log.append(("used" if handle in store._coming else "late", handle))
            return get(store, handle)

        def on_reverse(run: Run, step: Any, *arguments: Any) -> Any:
            self.log.append(("chunk", step.span))
            return reverse(run, step, *arguments)

        def on_advance(run: Run, step: Any, *arguments: Any) -> Any:
            self.log.append(("chunk", step.span))
            return advance(run, step, *arguments)

        for owner, name, method in (
            (Store, "fetch", on_fetch),
            (Store, "get", on_get),
            (Run, "_reverse", on_reverse),
            (Run, "_advance", on_advance),
        ):
            monkeypatch.setattr(owner, name, method)

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.log)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    # of sums, Rebuild keeps nothing
    [*product([GatedRecurrence, AllKinds], SCHEDULES), *product([LinearAttention], SCHEDULES[1:])],
)
def test_what_is_loaded_next_is_read_while_a_chunk_runs(
    kind: type[nn.Module], schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy that is loaded from a file was asked for once, before the chunk before it or one or two earlier."""
    watched = Watched(monkeypatch)
    sg.backward(kind(), TOKENS, chunk=CHUNK, schedule=schedule(store="disk"))
    assert watched.count("late") == 0
    assert watched.count("used") == watched.count("fetch") > 0
    last_fetch: dict[Handle, int] = {}
    for number, (what, handle) in enumerate(watched.log):
        if what == "fetch":
            last_fetch[handle] = number
        if what == "used":
            between = [name for name, _ in watched.log[last_fetch[handle] : number]]
            assert 1 <= between.count("chunk") <= 3


@pytest.mark.parametrize("store", ["device", "host"])
def test_what_lies_in_memory_is_not_fetched(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("slimgrad.sweep.store.ThreadPoolExecutor", lambda *a, **k: started.append(a))
    sg.backward(AllKinds(), TOKENS, chunk=CHUNK, schedule=sg.Keep(store=store))
    assert started == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "Input/output error"), sg.StorageError),
        (MemoryError("no room to read"), sg.MemoryLimitError),
    ],
)
def test_an_error_of_the_thread_that_reads_comes_out(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    def fail(file: ScratchFile, *given: Any) -> int:
        assert threading.current_thread() is not threading.main_thread()
        raise error

    monkeypatch.setattr(ScratchFile, "_get", fail)
    model = AllKinds()
    with pytest.raises(expected, match=str(error.args[-1])):
        sg.backward(model, TOKENS, chunk=CHUNK, schedule=sg.Keep(store=tmp_path))
    assert all(p.grad is None for p in model.parameters())
    assert list(tmp_path.iterdir()) == []
    assert readers() == []
