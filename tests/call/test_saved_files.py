"""What lies in the folder: whole or as it was before, whenever the writing ends; and what is not whole is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.measure import LiveBytes
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.call import saving
from slimgrad.call.saving import read_document, write_document
from tests.call.segments import TOKENS, bits, built, different, finished, saved_at, segment

OPERATIONS = ((io, "open"), (os, "open"), (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "close"))


class Killed(BaseException):
    """As a kill is, nobody hears of it."""


@contextmanager
def watched(before: Callable[[str, Any], None]) -> Generator[None]:
    """Within the block, `before` hears of each operation on files, with the file, before it is carried out."""

    def wrapped(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name, args[0])
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, wrapped(getattr(module, name), name))
        yield


@pytest.fixture
def two_saves(tmp_path: Path) -> tuple[Path, sg.Segment, list[dict[str, Any]]]:
    """A folder with a save of the first sweep, a segment in its second that is to take its place, and both contents."""
    folder = saved_at(tmp_path / "saved", 3, built("a mix"))
    one = segment(built("a mix"))
    one.forward()
    one.save(tmp_path / "other")
    return folder, one, [read_document(folder)[0], read_document(tmp_path / "other")[0]]


FILES = ["progress", "rows", "segment"]  # of a mix


def files(folder: Path) -> list[str]:
    """What is in a folder, by the beginnings of the names."""
    return sorted(re.split(r"[-.]", path.name)[0] for path in folder.iterdir())


def at(document: dict[str, Any]) -> str:
    return document["progress"]["phase"]


# --- killed, or out of room ---


def test_killed_between_any_two_operations(two_saves: tuple[Path, sg.Segment, list[dict[str, Any]]]) -> None:
    """What was saved last is there: the old or the new, and goes on to the same bits."""
    folder, one, _ = two_saves
    expected = built("a mix")
    whole = bits(expected, finished(segment(expected)))
    original, found = folder.with_name("original"), list[str]()
    folder.rename(original)
    for number in range(99):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        left = number

        def before(name: str, file: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:  # nothing is carried out any more
                raise Killed

        try:
            with watched(before):
                one.save(folder)
        except Killed:
            found.append(at(read_document(folder)[0]))
            model = built("a mix")
            assert different(bits(model, finished(sg.Segment.load(folder, model, TOKENS))), whole) == []
            one.save(folder)  # and what a kill left lying about goes with the next save
            assert files(folder) == FILES
            continue
        break
    assert number > 10
    assert found == sorted(found)  # "forward" is the old one, "swept" the new one
    assert set(found) == {"forward", "swept"}
    assert at(read_document(folder)[0]) == "swept"


def test_a_file_is_on_the_disk_before_its_name_is(two_saves: tuple[Path, sg.Segment, list[dict[str, Any]]]) -> None:
    """What a power cut leaves: bytes, then the name, then the record that speaks of it, then the old one goes."""
    folder, one, _ = two_saves
    said, names = list[str](), dict[int, str]()
    original = os.open

    def before(name: str, file: Any) -> None:
        if name in ("fsync", "replace", "unlink"):
            said.append(f"{name} {names.get(file, Path(str(file)).name)}")

    def opened(path: Any, *args: Any) -> int:
        descriptor = original(path, *args)
        names[descriptor] = Path(path).name
        return descriptor

    with watched(before), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        one.save(folder)
    rows, data, record = ".partial-rows", ".partial-progress", ".partial-segment.json"
    missing = {f"unlink {partial}" for partial in (rows, data, record)}  # whether they are there or not
    said = [re.sub("(progress|rows)-.*(pt|bin)", "the old one", line) for line in said if line not in missing]
    expected = ["fsync " + rows, "replace " + rows, "fsync " + data, "replace " + data, "fsync saved"]
    expected += ["fsync " + record, "replace " + record, "fsync saved"]
    assert said == [*expected, "unlink the old one", "unlink the old one"]


def test_new_folders_are_on_the_disk_as_well(tmp_path: Path) -> None:
    """Else a power cut takes them, with all that is in them."""
    said = list[Path]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "push_to_disk", said.append)
        write_document(tmp_path / "gradient" / "step", {})
        assert said[1:] == [tmp_path / "gradient" / "step", tmp_path / "gradient", tmp_path]
        said.clear()
        write_document(tmp_path / "gradient" / "step", {})
        assert said[1:] == [tmp_path / "gradient" / "step"]


def test_no_room_leaves_what_was_saved_before(two_saves: tuple[Path, sg.Segment, list[dict[str, Any]]]) -> None:
    folder, one, _ = two_saves
    for number in range(99):
        left = number

        def before(name: str, file: Any) -> None:
            nonlocal left
            if name in ("open", "fsync", "replace"):
                left -= 1
                if left == -1:
                    raise OSError(errno.ENOSPC, "No space left on device")

        with watched(before), pytest.raises(sg.StorageError, match=rf"{folder}\S*: .* No space left on device"):
            one.save(folder)
        if at(read_document(folder)[0]) == "swept":  # all was written, and only the last push to the disk failed
            break
    assert number > 5
    one.save(folder)
    assert files(folder) == FILES


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
@pytest.mark.parametrize("room", [100, 10_000, 60_000])
def test_a_disk_that_fills_up_while_it_is_written(room: int, tmp_path: Path) -> None:
    """The system itself refuses to write more: at the beginning, in the middle of a tensor, at the end."""
    import resource

    document = {"phase": "old", "x": torch.zeros(2_000, 4)}  # of 32,000 bytes; twice that in the end
    write_document(tmp_path, document)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(sg.StorageError, match=r"expected to write it, got: File too large\. Free some space"):
            write_document(tmp_path, {"phase": "new", "x": torch.ones(2_000, 8), "y": torch.ones(9)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_document(tmp_path)[0]["phase"] == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_saved_on_another_gpu_comes_to_this_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = torch.device("cuda:1"), torch.rand(3)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: str(one))
    write_document(tmp_path, {"x": x, "device": one})
    monkeypatch.undo()
    found = read_document(tmp_path, torch.device("cpu"))[0]
    assert torch.equal(found["x"], x)
    assert found["device"] == one
    if not torch.cuda.is_available():
        with pytest.raises(sg.InputError, match="expected the devices that the segment was saved on"):
            read_document(tmp_path)


def test_a_failed_save_ends_the_sweep_and_a_load_goes_on(tmp_path: Path) -> None:
    """From `on_chunk` the error is the caller's, who makes room and loads."""
    expected = built("gates")
    whole = bits(expected, finished(segment(expected)))
    one, count = segment(built("gates")), 0

    def before(name: str, file: Any) -> None:
        if count >= 4 and name == "fsync":
            raise OSError(errno.ENOSPC, "No space left on device")

    def save(_: sg.Event) -> None:
        nonlocal count
        count += 1
        one.save(tmp_path)

    one.on_chunk = save
    with watched(before), pytest.raises(sg.StorageError):
        finished(one)
    model = built("gates")
    assert different(bits(model, finished(sg.Segment.load(tmp_path, model, TOKENS))), whole) == []


# --- damaged ---


def load(folder: Path) -> sg.Segment:
    return sg.Segment.load(folder, built("a mix"), TOKENS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_at(tmp_path / "saved", 7, built("a mix"))


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("progress-*.pt")
    return path


def test_one_flipped_byte(saved: Path) -> None:
    path, draw = data_file(saved), random.Random(0)
    content = path.read_bytes()
    for place in (0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(20))):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(sg.InputError, match=r"progress-\w+\.pt is damaged: expected sha256"):
            load(saved)
    path.write_bytes(content)
    load(saved)


def test_one_flipped_bit_of_the_record(saved: Path) -> None:
    """Refused, or in what nobody reads: the number of bytes, which is for people."""
    path, expected = saved / "segment.json", repr(read_document(saved)[0]["identity"])
    content, harmless = path.read_bytes(), set[int]()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(bytes(damaged))
            with suppress(sg.InputError):
                assert repr(read_document(saved)[0]["identity"]) == expected
                harmless.add(content[:place].count(b"\n"))
    assert {content.splitlines()[line].split(b":")[0] for line in harmless} == {b' "bytes"'}


@pytest.mark.parametrize("left", [0, 1, 1000, -1])
def test_a_truncated_file(left: int, saved: Path) -> None:
    path = data_file(saved)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(sg.InputError, match="is damaged"):
        load(saved)
    record = saved / "segment.json"
    record.write_bytes(record.read_bytes()[:left])
    with pytest.raises(sg.InputError, match=r"found one that cannot be read|is damaged"):
        load(saved)


def test_what_is_not_there(saved: Path, tmp_path: Path) -> None:
    data_file(saved).unlink()
    with pytest.raises(sg.InputError, match=r"expected a saved segment, found no progress-\w+\.pt"):
        load(saved)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(sg.InputError, match=r"expected a saved segment, found no segment\.json"):
            load(folder)


def test_another_format(saved: Path) -> None:
    record = json.loads((saved / "segment.json").read_text())
    (saved / "segment.json").write_text(json.dumps({**record, "format": 7}))
    with pytest.raises(sg.InputError, match="expected format 2, found 7: another slimgrad wrote it"):
        load(saved)


def test_no_code_is_run(tmp_path: Path) -> None:
    """Whoever can write to the folder cannot make the one who loads run a function."""

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    write_document(tmp_path, {"x": Attack()})
    with pytest.raises(sg.InputError, match="found one that cannot be read"):
        read_document(tmp_path)
    assert not (tmp_path / "attacked").exists()


# --- what it costs ---


class Wide(nn.Module):
    """One of each kind of state, large beside the model and beside a chunk's activations."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.head, self.width = nn.Embedding(13, width), nn.Linear(width, 13), width

    def initial_state(self, batch_size: int) -> dict[str, Any]:
        zeros = self.head.weight.new_zeros
        return {
            "sums": sg.PrefixSum(zeros(batch_size, self.width, self.width)),
            "rows": sg.Growing(zeros(batch_size, 0, 4 * self.width)),
            "gate": zeros(batch_size, self.width, self.width),
        }

    def forward(self, inputs: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        x = self.embed(inputs)
        products = torch.einsum("bti,btj->bij", x, x)
        before, sums = state["sums"].advance(products)
        every, rows = state["rows"].append(x.repeat(1, 1, 4))
        gate = 0.9 * state["gate"] + 0.1 * products
        y = x @ (before + state["gate"]) + every.mean(1, keepdim=True)[..., : self.width]
        return self.head(y), {"sums": sums, "rows": rows, "gate": gate}


@pytest.mark.parametrize(
    "schedule", [sg.Rebuild(), sg.Keep(), sg.Every(3, store="host")], ids=lambda s: type(s).__name__
)
def test_saving_takes_next_to_no_memory(schedule: sg.Schedule, tmp_path: Path) -> None:
    """Beside what the segment holds anyway: one plain tensor of the state, as it is."""
    torch.manual_seed(0)
    model, tokens = Wide(), torch.randint(0, 13, (2, 512))
    one, taken, held = sg.Segment(model, tokens, chunk=32, schedule=schedule), list[int](), list[int]()

    def save(event: sg.Event) -> None:
        held.append(event.held_bytes)
        with LiveBytes() as counter:
            one.save(tmp_path)
        taken.append(counter.peak)

    one.on_chunk = save
    finished(one)
    state_bytes = 2 * 64 * 64 * 4
    assert max(held) > 50 * state_bytes  # most of it rows and their gradient
    # measured: one, a copy of the plain tensor
    assert max(taken) < 1.1 * state_bytes
