"""Snapshots are whole or absent, and what is read back is what was written, in every bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slimgrad import InputError, StorageError
from slimgrad.models import Performer
from slimgrad.train import build_model, read_snapshot, snapshot
from slimgrad.train.optimizer import make_optimizer
from slimgrad.train.snapshot import list_snapshots, restore, save_snapshot
from tests.train.settings import SNAPSHOT_FILES, TINY_MODEL, flip, tiny


def trained(seed: int = 0) -> tuple[Performer, torch.optim.Optimizer]:
    """A model and an optimiser that has taken a step."""
    model = build_model(tiny(seed=seed))
    optimizer = make_optimizer(tiny(), model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, step: int, seed: int = 0) -> Path:
    model, optimizer = trained(seed)
    return save_snapshot(folder, step=step, bytes_seen=10 * step, model=model, optimizer=optimizer)


def test_what_was_written_is_read_back_in_every_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    found = read_snapshot(path)
    assert (found.path, found.step, found.bytes_seen) == (path, 7, 70)
    assert found.environment == snapshot.describe_environment()
    model = build_model(tiny(seed=1))
    optimizer = make_optimizer(tiny(), model)
    restore(found, model, optimizer)
    expected_model, expected_optimizer = trained()
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    ours = snapshot.optimizer_tensors(model, optimizer)
    theirs = snapshot.optimizer_tensors(expected_model, expected_optimizer)
    assert ours.keys() == theirs.keys()
    assert {name.partition(":")[2] for name in ours} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_equal_states_leave_equal_files(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, 3) for name in "ab"]
    for name in SNAPSHOT_FILES:
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()


def test_the_latest_two_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    assert [path.name for path in list_snapshots(tmp_path)] == ["step-00000011", "step-00000010"]
    assert len(list(tmp_path.iterdir())) == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", SNAPSHOT_FILES)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_found_and_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = save(tmp_path, 3)
    damage(path / name)
    with pytest.raises(InputError, match=rf"snapshot .*step-00000003 is damaged: .*{name}"):
        read_snapshot(path)


def test_a_changed_step_does_not_pass_for_a_snapshot(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    record = json.loads((path / "snapshot.json").read_text())
    (path / "snapshot.json").write_text(json.dumps(record | {"step": 4}))
    with pytest.raises(InputError, match="does not match its own checksum"):
        read_snapshot(path)


def test_a_model_of_another_shape_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    found = read_snapshot(save(tmp_path, 3))
    other = Performer(dataclasses.replace(TINY_MODEL, layers=3, norm="pre"))
    with pytest.raises(InputError, match="another shape: layers 2 instead of 3, norm 'rms' instead of 'pre'"):
        restore(found, other, make_optimizer(tiny(), other))


def test_a_foreign_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="expected a safetensors file, got"):
        snapshot.read_model_file(tmp_path / "text")
    snapshot.save_tensors(tmp_path / "foreign", {"x": torch.zeros(2)})
    with pytest.raises(InputError, match="expected a model that slimgrad wrote"):
        snapshot.read_model_file(tmp_path / "foreign")
    with pytest.raises(InputError, match="expected a safetensors file, found none"):
        snapshot.read_model_file(tmp_path / "absent")


class Killed(BaseException):
    """Nothing that the code could catch by name."""


# everything that writing a snapshot calls and that a disk may refuse, and how often
WRITES = {
    (Path, "mkdir"): 1,
    (snapshot, "save_tensors"): 2,
    (snapshot, "sha256"): 2,
    (Path, "write_text"): 1,
    (snapshot, "push_to_disk"): 5,
    (Path, "rename"): 1,
}
PLACES = [(*place, calls) for place, times in WRITES.items() for calls in range(times)]
REMOVAL = [(Path, "rename", 1), (shutil, "rmtree", 1), (shutil, "rmtree", 2)]


def fail(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: BaseException) -> Callable[[], int]:
    """Have a function raise from its call number `calls` (from 0) on; how often it was called."""
    whole, count = getattr(owner, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return whole(*arguments, **options)

    patch.setattr(owner, name, failing)
    return lambda: count


def named(place: tuple[Any, str, int]) -> str:
    return f"{place[1]}-{place[2]}"


@pytest.mark.parametrize("place", PLACES, ids=named)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, place: tuple[Any, str, int]) -> None:
    save(tmp_path, 1)
    step = "step-00000002"
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, *place, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(StorageError, match=rf"{step}: expected to write it, got: No space left on device\. Free"):
            save(tmp_path, 2)
    last = place == (snapshot, "push_to_disk", 4)  # of the folder's names: the snapshot itself is whole
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", *([step] if last else [])}
    assert all(read_snapshot(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize("place", PLACES + REMOVAL, ids=named)
def test_a_kill_between_any_two_writes_leaves_whole_snapshots(tmp_path: Path, place: tuple[Any, str, int]) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with pytest.MonkeyPatch.context() as patch:
        if place[0] is not shutil:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a dead process tidies nothing up
        called = fail(patch, *place, Killed())
        with pytest.raises(Killed):
            save(tmp_path, 3)
        assert called() > place[2]
    found = list_snapshots(tmp_path)
    assert len(found) >= 2
    assert [read_snapshot(path).step for path in found] in ([2, 1], [3, 2], [3, 2, 1])
    following = read_snapshot(found[0]).step + 1
    save(tmp_path, following)
    assert [read_snapshot(path).step for path in list_snapshots(tmp_path)] == [following, following - 1]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE refuses a large file on Linux")
def test_a_file_that_the_system_refuses_to_let_grow_is_a_storage_error(tmp_path: Path) -> None:
    program = (
        "import resource, sys, pathlib\n"
        "from slimgrad import StorageError\n"
        "from tests.train.test_snapshot import save\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "save(folder, 1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    save(folder, 2)\n"
        "except StorageError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, cwd=root)
    assert "step-00000002: expected to write it, got: " in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_snapshot(tmp_path / "step-00000001").step == 1
