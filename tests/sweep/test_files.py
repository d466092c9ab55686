"""What lies in a file is what was put there, or an error by name; memory does not hold it; and no kill leaves it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slimgrad as sg
from slimgrad.budget.process import proc_status
from slimgrad.sweep.files import ScratchFile, bytes_of
from slimgrad.sweep.store import Store
from tests.sweep.opened import open_files
from tests.toy_models import GatedRecurrence

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reaches for files without a name through /proc")

ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
STATE_BYTES = 2 * 6 * 4


def cut_off(file: int) -> None:
    os.ftruncate(file, 1)


def flip_a_bit(file: int) -> None:
    [byte] = os.pread(file, 1, 5)
    os.pwrite(file, bytes([byte ^ 4]), 5)


def overwrite(file: int) -> None:
    size = os.fstat(file).st_size
    os.pwrite(file, bytes(size), 0)


def put_another_state_there(file: int) -> None:
    """Bytes that were written, elsewhere."""
    size = os.fstat(file).st_size
    os.pwrite(file, os.pread(file, STATE_BYTES, size // 4096 * 4096 - 4096), 0)


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        (cut_off, r"expected 48 bytes, got \d+: it was cut off"),
        (flip_a_bit, "expected 48 bytes, read back with other bytes than were written"),
        (overwrite, "expected 48 bytes, read back with other bytes than were written"),
        (put_another_state_there, "expected 48 bytes, read back with other bytes than were written"),
    ],
)
@pytest.mark.parametrize("schedule", [sg.Keep, sg.Rebuild, lambda **place: sg.Binomial(3, **place)])
def test_a_damaged_file_is_an_error(
    damage: Callable[[int], None], how: str, schedule: Callable[..., sg.Schedule], tmp_path: Path
) -> None:
    """Once both sweeps have met; what was kept first, and will be read last, lies at the file's beginning."""

    def harm(event: sg.Event) -> None:
        if event.phase == "reverse" and event.stop == event.length:
            [file] = open_files(tmp_path)
            damage(file)

    model = GatedRecurrence()
    with pytest.raises(sg.StorageError, match=rf"^{tmp_path}: a file .* of kept states: {how}. What it held is lost"):
        sg.backward(model, TOKENS, chunk=7, schedule=schedule(store=tmp_path), on_chunk=harm)
    assert all(p.grad is None for p in model.parameters())
    assert open_files(tmp_path) == []


def test_a_folder_that_goes_meanwhile_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    model = GatedRecurrence()

    def remove(event: sg.Event) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    sg.backward(model, TOKENS, chunk=7)
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    sg.backward(model, TOKENS, chunk=7, schedule=sg.Keep(store=folder), on_chunk=remove)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert not folder.exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_an_error_of_the_call(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", refuse)
    model = GatedRecurrence()
    with pytest.raises(sg.StorageError, match=f"^{tmp_path}: .* expected 48 bytes, got: {os.strerror(code)}. What it"):
        sg.backward(model, TOKENS, chunk=7, schedule=sg.Keep(store=tmp_path))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("number", range(5))
def test_what_cannot_be_written_is_an_error_of_the_call(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write it is: of five, the last ones are asked for when the first sweep is all but over."""
    write, calls = os.pwrite, []

    def refuse(*given: Any) -> int:
        calls.append(given)
        if len(calls) == number + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(*given)

    monkeypatch.setattr(os, "pwrite", refuse)
    model = GatedRecurrence()
    with pytest.raises(sg.StorageError, match=rf"^{tmp_path}: expected to write \d+ bytes .* got: Input/output error"):
        sg.backward(model, TOKENS, chunk=7, schedule=sg.Keep(store=tmp_path))
    assert all(p.grad is None for p in model.parameters())
    assert len(calls) == number + 1  # nothing is put into a file that has failed


def test_what_the_system_does_in_pieces_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: write(file, data[:5], start))
    monkeypatch.setattr(os, "preadv", lambda file, into, start: read(file, [into[0][:3]], start))
    x, store = torch.rand(17), Store(tmp_path)
    assert torch.equal(store.get(store.put(0, x)), x)
    store.close()


# --- memory ---


def test_memory_does_not_hold_what_is_on_disk(tmp_path: Path) -> None:
    store, x = Store(tmp_path, 200), torch.rand(1 << 18)
    held = proc_status("VmRSS")
    assert held is not None
    kept = [store.put(0, x * k) for k in range(200)]
    for k, handle in enumerate(kept):
        assert torch.equal(store.get(handle), x * k)
    after = proc_status("VmRSS")
    assert after is not None
    assert after - held < 64 << 20  # of the two hundred MiB
    assert store.nbytes == 200 << 20
    assert max(tensor.nbytes for slab in store.state() for tensor in [slab["rows"]]) == 199 << 20  # mapped
    store.close()


def test_few_copies_wait_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = os.pwrite, []

    def slowly(*given: Any) -> int:
        time.sleep(0.002)
        written.append(given)
        return write(*given)

    monkeypatch.setattr(os, "pwrite", slowly)
    store = Store(tmp_path, 20)
    for number in range(20):
        store.put(0, torch.rand(100))
        assert number + 1 - len(written) <= 2
    store.close()


# --- saved ---


def test_a_damaged_file_is_found_when_it_is_saved(tmp_path: Path) -> None:
    store = Store(tmp_path, 3)
    kept = [store.put(0, torch.rand(12)) for _ in range(3)]
    assert store.get(kept[0]) is not None  # all is written
    [file] = open_files(tmp_path)
    flip_a_bit(file)
    with pytest.raises(sg.StorageError, match="read back with other bytes than were written"):
        store.state()
    store.free(kept[0])
    store.state()  # what nobody keeps may be anything
    cut_off(file)
    with pytest.raises(sg.StorageError, match="it was cut off"):
        store.state()
    store.close()


@pytest.mark.parametrize("before", ["device", "folder"])
@pytest.mark.parametrize("after", ["device", "folder"])
def test_slabs_move_between_places(before: str, after: str, tmp_path: Path) -> None:
    one, other = (Store(tmp_path if place == "folder" else place, 3) for place in (before, after))
    values = [torch.rand(3, 5), torch.rand(3, 5), torch.tensor(2.5), torch.rand(0, 2)]
    kept = [one.put(leaf, x) for leaf, x in zip((0, 0, 1, 2), values, strict=True)]
    other.load_state(one.state(), {})
    assert all(torch.equal(other.get(handle), x) for handle, x in zip(kept, values, strict=True))
    assert other.put(0, values[0]).slab == kept[1].slab  # there is a row left
    one.close()
    other.close()


# --- killed ---

KILLED = """
import os, pathlib, signal, sys, tempfile, torch, slimgrad as sg
from tests.sweep.opened import open_files
from tests.toy_models import AllKinds
tempfile._O_TMPFILE_WORKS = sys.argv[2] == "without a name"
folder = pathlib.Path(sys.argv[1])

def kill(event):
    if event.phase == "reverse" and event.start < 20:
        print(len(open_files(folder)), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

schedule = sg.Keep(store=folder, rows=folder)
sg.backward(AllKinds(), torch.randint(0, 13, (1, 60)), chunk=7, schedule=schedule, on_chunk=kill)
"""


@pytest.mark.parametrize("how", ["without a name", "unlinked"])
def test_a_kill_leaves_nothing(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout) >= 2
    assert list(tmp_path.iterdir()) == []


def test_another_process_file_is_its_own(tmp_path: Path) -> None:
    one, other = ScratchFile(tmp_path), ScratchFile(tmp_path)
    x, y = torch.rand(4), torch.rand(4)
    checksums = [file.write(bytes_of(z), file.reserve(16)) for file, z in ((one, x), (other, y))]
    one.close()
    back = torch.empty(4)
    other.read(bytes_of(back), 0, checksums[1])
    assert torch.equal(back, y)
    other.close()
