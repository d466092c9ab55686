"""The folder of a run: made new, taken up again, never written over, one process at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from slimgrad import InputError
from slimgrad.bytelm import RunFolder, Trained, open_model, train
from slimgrad.bytelm.folder import read_rows
from slimgrad.runs.snapshot import read_snapshot
from slimgrad.runs.tensors import save_tensors
from tests.bytelm.settings import corpus, flip, tiny


def run(path: Path, steps: int = 6) -> Trained:
    config = tiny(steps=steps, save_every=2)
    with RunFolder.create(path, "fox", {"config": config.to_dict()}) as folder:
        return train(config, corpus(), run=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    run(path)
    return path


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))


def test_a_run_holds_its_configuration_its_metrics_and_two_snapshots(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {".lock", "config.json", "metrics.jsonl", "snapshots"}
    assert [path.name for path in sorted((finished / "snapshots").iterdir())] == ["step-00000004", "step-00000006"]
    assert [row.step for row in read_rows(finished)] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_never_takes_a_place_that_is_taken(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").touch()
    expected = {
        tmp_path / "file": "found a file",
        tmp_path / "folder": "found a folder that holds something",
        finished: f"found a run. Go on with it: slimgrad train --resume {finished}, or name another",
    }
    for path, message in expected.items():
        with pytest.raises(InputError, match=f"--out {path}: expected a new or empty folder, {message}"):
            RunFolder.create(path, "fox", {})
    with pytest.raises(InputError, match="cannot be made: Not a directory"):
        RunFolder.create(tmp_path / "file" / "below", "fox", {})


def test_without_a_name_a_run_gets_a_fresh_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(2):
        with RunFolder.create(None, "fox", {"config": tiny().to_dict()}) as folder:
            paths.append(folder.path)
    assert paths[0] != paths[1]
    assert all(path.parent == Path("runs") and path.name.startswith("fox-2") for path in paths)


def test_two_processes_never_work_on_one_run(mine: Path) -> None:
    with RunFolder.reopen(mine), pytest.raises(InputError, match="another process works on this run"):
        RunFolder.reopen(mine)
    with RunFolder.reopen(mine) as again:
        assert again.snapshot is not None


def test_a_refused_snapshot_gives_the_lock_back(mine: Path) -> None:
    for path in (mine / "snapshots").iterdir():
        flip(path / "snapshot.json")
    for _ in range(2):
        with pytest.raises(InputError, match="No other one is intact"):
            RunFolder.reopen(mine)


def test_reopening_forgets_what_came_after_the_snapshot(mine: Path) -> None:
    metrics = mine / "metrics.jsonl"
    seventh = json.loads(metrics.read_text().splitlines()[-1]) | {"step": 7}
    metrics.write_text(metrics.read_text() + json.dumps(seventh) + '\n{"step": 8, "len')
    (mine / "snapshots" / ".partial-step-00000008").mkdir()
    with RunFolder.reopen(mine) as folder:
        assert [row.step for row in folder.rows()] == [1, 2, 3, 4, 5, 6]
    assert metrics.read_bytes().endswith(b"}\n")
    assert {path.name for path in (mine / "snapshots").iterdir()} == {"step-00000004", "step-00000006"}


@pytest.mark.parametrize("end", [b"\0\0\0\0", b'\0\0, "bits": 2.0}\n', b'{"step": 7}\n{"ste\n', b"\xff\n", b"7\n"])
def test_metrics_that_a_power_cut_spoilt_after_the_snapshot_are_dropped(mine: Path, end: bytes) -> None:
    metrics = mine / "metrics.jsonl"
    before = metrics.read_bytes()
    metrics.write_bytes(before + end)
    with RunFolder.reopen(mine) as folder:
        assert [row.step for row in folder.rows()] == [1, 2, 3, 4, 5, 6]
    assert metrics.read_bytes() == before


def test_metrics_that_are_spoilt_before_the_snapshot_are_named(mine: Path) -> None:
    metrics = mine / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    spoilt = b"".join([*lines[:2], b"{\n", *lines[3:]])
    metrics.write_bytes(spoilt)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 3: expected the row of a step, in order, found what"):
        RunFolder.reopen(mine)
    assert metrics.read_bytes() == spoilt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((2, "step", 8), "line 3: .* found step 8"),
        ((0, "step", 9), "line 2: .* found step 2"),
        ((3, "step", 2), "line 4: .* found step 2"),
        ((1, "step", 2.5), "line 2: .* found what cannot be read"),
        ((0, "step", True), "line 1: .* found what cannot be read"),
        ((4, "bits", "many"), "line 5: .* found what cannot be read"),
        ((4, "seconds", None), "line 5: .* found what cannot be read"),
        ((5, None, None), "line 6: .* found the end of the file"),
        ((2, None, None), "line 3: .* found step 4"),
    ],
)
def test_metrics_that_were_edited_are_named_and_no_row_is_cut(
    change: tuple[int, str | None, object], message: str, mine: Path
) -> None:
    metrics = mine / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    index, name, value = change
    lines[index] = "" if name is None else json.dumps(json.loads(lines[index]) | {name: value}) + "\n"
    metrics.write_text("".join(lines))
    with pytest.raises(InputError, match=message):
        RunFolder.reopen(mine)
    assert metrics.read_text() == "".join(lines)


def test_an_unfinished_last_line_is_no_row(mine: Path) -> None:
    with (mine / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7')
    assert [row.step for row in read_rows(mine)] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_snapshot_is_named_and_the_one_before_offered_and_taken(mine: Path) -> None:
    flip(mine / "snapshots" / "step-00000006" / "model.safetensors")
    earlier = mine / "snapshots" / "step-00000004"
    with pytest.raises(
        InputError,
        match=rf"step-00000006 is damaged: model.*The one before it is intact, and can be named.*: {earlier}$",
    ):
        RunFolder.reopen(mine)
    with RunFolder.reopen(earlier) as folder:
        assert folder.path == mine.resolve()
        assert folder.snapshot is not None
        assert folder.snapshot.step == 4
        assert [row.step for row in folder.rows()] == [1, 2, 3, 4]
        assert train(folder.config, corpus(), run=folder).rows[-1].step == 6
    names = {path.name for path in (mine / "snapshots").iterdir()}
    assert names == {"step-00000004", "step-00000006", "superseded-step-00000006"}
    assert read_snapshot(mine / "snapshots" / "step-00000006").step == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found a folder without config.json"),
        ("{", "cannot be read"),
        ('{"config": {"steps": 3}}', "cannot be read"),
    ],
)
def test_a_record_that_is_missing_or_damaged_is_said(mine: Path, content: str | None, message: str) -> None:
    (mine / "config.json").unlink()
    if content is not None:
        (mine / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        RunFolder.reopen(mine)
    with pytest.raises(InputError, match=message):
        open_model(mine)


def test_a_model_opens_from_a_run_a_snapshot_or_its_file_alone(finished: Path, tmp_path: Path) -> None:
    latest = finished / "snapshots" / "step-00000006"
    alone = tmp_path / "model.safetensors"
    shutil.copy(latest / "model.safetensors", alone)
    opened = {path: open_model(path) for path in (finished, latest, latest / "model.safetensors", alone)}
    expected = opened[finished][0].state_dict()
    for path, (model, config) in opened.items():
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert (config is None) == (path.suffix == ".safetensors")
    earlier, _ = open_model(finished / "snapshots" / "step-00000004")
    assert any(not torch.equal(value, expected[name]) for name, value in earlier.state_dict().items())


def test_what_slimgrad_did_not_write_is_no_model(tmp_path: Path) -> None:
    text, foreign, shaped = (tmp_path / name for name in ("notes.txt", "foreign.safetensors", "shaped.safetensors"))
    text.write_text("hello")
    save_tensors(foreign, {"weight": torch.zeros(2)})
    save_tensors(shaped, {"weight": torch.zeros(2)}, {"slimgrad_model": json.dumps(asdict(tiny().model))})
    expected = {
        text: "expected a safetensors file, got",
        foreign: "expected a model that slimgrad wrote, with its shape in the metadata",
        shaped: r"expected the tensors .*, found others or other shapes: \['weight'\]",
    }
    for path, message in expected.items():
        with pytest.raises(InputError, match=f"{path}: {message}"):
            open_model(path)


def test_a_damaged_snapshot_is_no_model(mine: Path) -> None:
    flip(mine / "snapshots" / "step-00000006" / "optimizer.safetensors")
    for path in (mine, mine / "snapshots" / "step-00000006"):
        with pytest.raises(InputError, match=r"step-00000006 is damaged: optimizer\.safetensors"):
            open_model(path)


def test_a_snapshot_that_was_moved_away_is_still_a_model(mine: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "step-00000006"
    moved.parent.mkdir()
    (mine / "snapshots" / "step-00000006").rename(moved)
    model, config = open_model(moved)
    assert config is None
    assert model.config == tiny().model


def test_what_another_process_works_on_is_refused_until_it_dies(mine: Path) -> None:
    program = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); "
        "sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program, mine / ".lock"], stdin=PIPE, stdout=PIPE)
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(InputError, match="another process works on this run"):
            RunFolder.reopen(mine)
        other.kill()
    with RunFolder.reopen(mine) as folder:
        assert folder.snapshot is not None


def test_a_run_without_a_snapshot_has_no_model(mine: Path, tmp_path: Path) -> None:
    shutil.rmtree(mine / "snapshots")
    with pytest.raises(InputError, match="the run has no snapshot yet"):
        open_model(mine)
    with pytest.raises(InputError, match="expected the folder of a run, found no such folder"):
        open_model(tmp_path / "absent")


def test_files_of_a_run_are_replaced_whole(mine: Path) -> None:
    with RunFolder.reopen(mine) as folder:
        folder.write("sample.txt", b"one")
        folder.write("sample.txt", b"two")
    assert (mine / "sample.txt").read_bytes() == b"two"
    assert not list(mine.glob(".partial*"))


def test_a_run_that_begins_with_a_model_saves_it_first(mine: Path, tmp_path: Path) -> None:
    model, config = open_model(mine)
    assert config is not None
    with RunFolder.create(tmp_path / "new", "fox", {"config": config.to_dict()}, model) as folder:
        assert folder.snapshot is not None
    again, _ = open_model(tmp_path / "new")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
