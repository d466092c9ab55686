"""Kept states come back as they were, from anywhere, out of few slabs, and leave nothing behind."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.sweep import files
from slimgrad.sweep.files import ScratchFile
from slimgrad.sweep.store import Store
from tests.sweep.opened import open_files, wait_for_threads
from tests.toy_models import GatedRecurrence, Signals

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at open files in /proc")


@pytest.fixture(params=["device", "host", "disk", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    return tmp_path if request.param == "folder" else request.param


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(3, 5),
        torch.rand(2, 3, 7, dtype=torch.float64),
        torch.rand(11).bfloat16(),
        torch.randint(0, 9, (4,)),
        torch.tensor([True, False, True]),
        torch.tensor(2.5),
        torch.zeros(2, 0, 3),
        torch.rand(4, 6).t(),
        torch.complex(torch.rand(3), torch.rand(3)),
    ],
    ids=["matrix", "float64", "bfloat16", "integers", "flags", "a number", "nothing", "transposed", "complex"],
)
def test_what_is_put_comes_back(place: str | Path, x: Tensor) -> None:
    store = Store(place, 5)
    kept = [(store.put(0, x * k if x.dtype != torch.bool else x), k) for k in range(4)]
    for handle, k in kept:
        back = store.get(handle)
        assert torch.equal(back, x * k if x.dtype != torch.bool else x)
        assert (back.dtype, back.shape) == (x.dtype, x.shape)
        assert back.is_contiguous()
        assert back.data_ptr() % 64 == 0  # as torch allocates: matrix products give other bits elsewhere
    store.close()


def test_rows_on_an_accelerator_begin_where_torch_would() -> None:
    """At multiples of 512 bytes; "meta" is any device that is no CPU."""
    store = Store("device", 5)
    rows = [store.get(store.put(0, torch.empty(3, 5, device="meta"))) for _ in range(3)]
    assert [row.storage_offset() * row.itemsize % 512 for row in rows] == [0, 0, 0]
    assert max(row.storage_offset() for row in rows) > 0


def test_slabs_of_a_device_come_back_on_another() -> None:
    one, other = torch.device("cuda:1"), torch.device("cpu")
    store, x = Store("host", 2), torch.rand(3, 5)
    handle, saved = store.put(0, x), store.state()
    (_, *rest, _), *_ = (slab["layout"] for slab in saved)
    saved[0]["layout"] = (0, *rest, one)  # as it is where it was kept of a tensor on that device
    again = Store("host", 2)
    again.load_state(saved, {one: other})
    assert torch.equal(again.get(handle), x)
    again.free(handle)
    assert again.put(0, x) == handle  # a row of this device's


def test_one_row_then_one_slab_for_the_rest() -> None:
    store = Store("device", 10)
    x = torch.zeros(4, 4)
    store.put(0, x)
    assert store.nbytes == 64  # a constant would never need more
    store.put(0, x)
    assert store.nbytes == 10 * 64
    for _ in range(8):
        store.put(0, x)
    assert store.nbytes == 10 * 64
    store.put(0, x)  # more than was said: still kept, in a slab of its own
    assert store.nbytes == 11 * 64
    store.close()
    assert store.nbytes == 0


def test_leaves_and_layouts_do_not_share_slabs() -> None:
    store = Store("device", 3)
    a, b = store.put(0, torch.zeros(4)), store.put(1, torch.ones(4))
    c, d = store.put(0, torch.full((5,), 2.0)), store.put(0, torch.full((4,), 3, dtype=torch.int32))
    assert len({handle.slab for handle in (a, b, c, d)}) == 4
    assert [float(store.get(handle)[0]) for handle in (a, b, c, d)] == [0, 1, 2, 3]


def test_freed_rows_are_used_again(place: str | Path) -> None:
    store = Store(place, 3)
    kept = [store.put(0, torch.full((5,), float(k))) for k in range(3)]
    full = store.nbytes
    for k in range(20):
        store.free(kept.pop(0))
        kept.append(store.put(0, torch.full((5,), 100.0 + k)))
    assert store.nbytes == full
    assert [float(store.get(handle)[0]) for handle in kept] == [117.0, 118.0, 119.0]
    store.close()


def test_a_kept_copy_is_a_copy() -> None:
    store, x = Store("device", 1), torch.zeros(3)
    handle = store.put(0, x)
    x += 1
    assert torch.equal(store.get(handle), torch.zeros(3))


@on_linux
def test_a_file_has_no_name_and_is_gone_after_the_call(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(event: sg.Event) -> None:
        seen.append(sum(os.fstat(file).st_blocks for file in open_files(tmp_path)))
        assert list(tmp_path.iterdir()) == []

    sg.backward(GatedRecurrence(), TOKENS, chunk=7, schedule=sg.Keep(store=tmp_path), on_chunk=look)
    assert max(seen) > 0
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("phase", ["forward", "reverse"])
@on_linux
def test_files_go_after_an_error(tmp_path: Path, phase: str) -> None:
    def fail(event: sg.Event) -> None:
        if event.phase == phase and event.start == 21:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sg.backward(GatedRecurrence(), TOKENS, chunk=7, schedule=sg.Keep(store=tmp_path), on_chunk=fail)
    assert open_files(tmp_path) == []


@on_linux
def test_files_go_with_a_loss_that_nobody_calls_backward_on(tmp_path: Path) -> None:
    loss = sg.loss(GatedRecurrence(), TOKENS, chunk=7, schedule=sg.Keep(store=tmp_path))
    assert len(open_files(tmp_path)) == 1
    del loss
    wait_for_threads()
    gc.collect()  # and no ResourceWarning, which would be an error here
    assert open_files(tmp_path) == []


def test_a_constant_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    puts: list[int] = []
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda self, leaf, x: puts.append(leaf) or put(self, leaf, x))
    inputs = {side: torch.randn(2, 40, 3) for side in ("left", "right")}
    for schedule in (sg.Keep(), sg.Rebuild(), sg.Binomial(3), sg.Every(3)):
        puts.clear()
        sg.backward(Signals(), inputs, torch.zeros(2, 40, dtype=torch.int64), chunk=4, schedule=schedule)
        assert puts.count(1) == 1  # leaf 1 never changes
        assert puts.count(0) >= 3


class Awkward(nn.Module):
    """Float32 products with a state whose rows are no multiple of 64 bytes, transposed before it is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 9)
        self.mix = nn.Parameter(torch.randn(9, 9) / 3)
        self.head = nn.Linear(9, 13)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.mix[0].expand(batch_size, 9)  # every row the same memory

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, outputs = self.embed(inputs), []
        for t in range(x.shape[1]):
            state = torch.tanh(state @ self.mix.t() + x[:, t])
            outputs.append(state)
        return self.head(torch.stack(outputs, 1)), state.t().contiguous().t()


@pytest.mark.parametrize(
    "schedule", [sg.Keep(), sg.Every(3), sg.Binomial(2), sg.Keep(store="host"), sg.Keep(store="disk")]
)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_layout_and_alignment_do_not_move_bits(schedule: sg.Schedule, batch: int) -> None:
    model = Awkward()
    tokens = torch.randint(0, 13, (batch, 50))
    sg.backward(model, tokens, chunk=6, schedule=schedule)  # a difference in one bit would raise
    misaligned = torch.zeros(batch * 9 + 1)[1:].view(batch, 9)
    sg.backward(model, tokens, chunk=6, schedule=schedule, state=misaligned)


# --- a disk that will not take them ---

ROOT = Path(__file__).parents[2]


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, *, after: int = 0) -> None:
    """The system's call fails with `code`, from the call after the first `after` ones on."""
    real, calls = os.posix_fallocate, []

    def fallocate(descriptor: int, start: int, num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        real(descriptor, start, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)


needs_fallocate = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system has no posix_fallocate")


@needs_fallocate
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_a_full_disk_stops_the_call_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, after: int, code: int
) -> None:
    model, schedule = GatedRecurrence(), sg.Keep(store=tmp_path)
    sg.backward(model, TOKENS, chunk=7)
    before = [p.grad.clone() for p in model.parameters()]
    with monkeypatch.context() as full:
        refuse(full, code, after=after)
        wanted = (
            rf"{tmp_path}: expected to reserve [\d,]+ bytes for kept states, got: {os.strerror(code)}\. Name a folder"
        )
        with pytest.raises(sg.StorageError, match=wanted):
            getattr(sg, way)(model, TOKENS, chunk=7, schedule=schedule)
        assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    sg.backward(model, TOKENS, chunk=7, schedule=schedule)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), before, strict=True))
    assert list(tmp_path.iterdir()) == []


@needs_fallocate
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse(monkeypatch, code)
    check_written(tmp_path)


@on_linux
def test_a_system_that_has_no_such_call_writes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    check_written(tmp_path)


def check_written(folder: Path) -> None:
    file = ScratchFile(folder)
    file.reserve(7)
    start = file.reserve(3 << 19)  # one and a half of the pieces that are written
    assert start == mmap.ALLOCATIONGRANULARITY
    [opened] = open_files(folder)
    assert os.fstat(opened).st_size == start + (3 << 19)
    assert os.fstat(opened).st_blocks * 512 >= 3 << 19  # no holes
    file.close()


@on_linux
def test_a_slab_has_no_holes_before_anything_is_written(tmp_path: Path) -> None:
    store, x = Store(tmp_path, 100), torch.rand(1 << 12)
    store.put(0, x)
    store.put(0, x)  # 99 rows, of which one is written
    [file] = open_files(tmp_path)
    assert os.fstat(file).st_size == 100 * x.nbytes
    assert os.fstat(file).st_blocks * 512 >= 100 * x.nbytes
    store.close()


def test_a_folder_that_is_not_there_or_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    model = GatedRecurrence()
    for name, reason in (("absent", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(sg.StorageError, match=rf"{name}: expected a folder that files .* got: {reason}\. Make it"):
            sg.backward(model, TOKENS, chunk=7, schedule=sg.Keep(store=tmp_path / name))
    assert all(p.grad is None for p in model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root writes everywhere, so the system's answer is played."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for store, name in ((tmp_path, re.escape(str(tmp_path))), ("disk", "the temporary folder")):
        with pytest.raises(sg.StorageError, match=f"{name}: expected a folder .* got: Read-only file system"):
            sg.backward(GatedRecurrence(), TOKENS, chunk=7, schedule=sg.Keep(store=store))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: mount needs root and Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """In a process of its own, which a write through a map would kill (SIGBUS)."""
    program = f"""
import pathlib, torch, slimgrad as sg
from tests.toy_models import GatedRecurrence
folder = pathlib.Path({str(small_disk)!r})
torch.manual_seed(0)
model, tokens = GatedRecurrence(width=512), torch.randint(0, 13, (1, 2000))
try:  # 999 states of 2 KiB; below, 249
    sg.backward(model, tokens, chunk=2, schedule=sg.Keep(store=folder))
except sg.StorageError as error:
    print(error)
assert all(p.grad is None for p in model.parameters())
assert not list(folder.iterdir())
sg.backward(model, tokens[:, :500], chunk=2, schedule=sg.Keep(store=folder))
assert all(p.grad is not None for p in model.parameters())
assert not list(folder.iterdir())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"small: expected to reserve 2,0\d\d,\d+ bytes .* got: No space left on device", done.stdout)


def test_without_the_reservation_the_first_write_that_finds_no_room_says_so(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_allocates", lambda *given: True)
    model, tokens = GatedRecurrence(width=512), torch.randint(0, 13, (1, 2000))
    with pytest.raises(sg.StorageError, match=r"small: expected to write 2,048 bytes .* got: No space left on device"):
        sg.backward(model, tokens, chunk=2, schedule=sg.Keep(store=small_disk))
    assert all(p.grad is None for p in model.parameters())
