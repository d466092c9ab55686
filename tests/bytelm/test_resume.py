"""A run that was stopped and goes on ends as an undisturbed one does, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from slimgrad import InputError, NonFiniteError, StorageError
from slimgrad.bytelm import (
    Row,
    RunFolder,
    TrainConfig,
    build_model,
    generate,
    open_model,
    train,
)
from slimgrad.bytelm.folder import read_rows
from slimgrad.data import Corpus
from tests.bytelm.settings import TINY_MODEL, corpus, documents, going_on, last_snapshot, timeless, tiny, whole

FAVOR = dataclasses.replace(TINY_MODEL, feature_map="favor", features=8, normalize=True, norm="pre")
RUNS: dict[str, tuple[TrainConfig, Corpus | None]] = {
    "shuffled": (tiny(steps=6), corpus()),
    "growing": (tiny(steps=8, first_length=24), corpus()),
    "consecutive": (tiny(steps=6, windows="consecutive", batch=2), corpus()),
    "random, accumulated": (tiny(steps=6, windows="random", accumulate=3), corpus()),
    "documents": (tiny(steps=6, windows="documents", batch=2, length=300), documents(50, 61, 300, 7, 250, 400)),
    "copying": (tiny(steps=6, task="copying", length=32, batch=2), None),
    "random features": (tiny(steps=6, model=FAVOR), corpus()),
    "bf16": (tiny(steps=6, precision="bf16"), corpus()),
}


class StoppedError(Exception):
    """Raised from a report, as a crash would be."""


def crashing(path: Path, config: TrainConfig, text: Corpus | None, after: int) -> None:
    """Run until the report of a step fails."""

    def report(row: Row) -> None:
        if row.step == after:
            raise StoppedError

    with pytest.raises(StoppedError), RunFolder.create(path, "fox", {"config": config.to_dict()}) as folder:
        train(config, text, report, run=folder)


@pytest.mark.parametrize(("name", "save_every"), [*((name, 3) for name in RUNS), ("shuffled", 1)])
def test_a_run_that_crashed_ends_as_if_it_had_not(tmp_path: Path, name: str, save_every: int) -> None:
    config, text = RUNS[name]
    config = config.replace(save_every=save_every, eval_every=3)
    expected = whole(tmp_path / "whole", config, text)
    crashing(tmp_path / "crashed", config, text, after=5)
    found = going_on(tmp_path / "crashed", text)
    assert timeless(found) == timeless(expected) == timeless(read_rows(tmp_path / "crashed"))
    assert last_snapshot(tmp_path / "crashed") == last_snapshot(tmp_path / "whole")


def test_a_run_that_never_saved_begins_again(tmp_path: Path) -> None:
    config = tiny(steps=4)
    expected = whole(tmp_path / "whole", config, corpus())
    with RunFolder.create(tmp_path / "killed", "fox", {"config": config.to_dict()}) as folder:
        folder.add(expected[0])
    assert timeless(going_on(tmp_path / "killed", corpus())) == timeless(expected)


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    expected = whole(tmp_path / "run", tiny(steps=4), corpus())
    before = last_snapshot(tmp_path / "run")
    assert timeless(going_on(tmp_path / "run", corpus())) == timeless(expected)
    assert last_snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("plain", "chunked", {}),
        ("chunked", "plain", {}),
        ("plain", "checkpoint", {}),
        ("chunked", "plain", {"model": FAVOR, "accumulate": 2}),
    ],
)
def test_a_run_may_change_how_its_gradients_are_computed(
    tmp_path: Path, before: str, after: str, changes: dict[str, Any]
) -> None:
    config = tiny(steps=10, method=before, save_every=1, **changes)
    expected = whole(tmp_path / "whole", config, corpus())
    crashing(tmp_path / "changed", config, corpus(), after=5)
    found = going_on(tmp_path / "changed", corpus(), method=after)
    assert [row.bits for row in found[:5]] == [row.bits for row in expected[:5]]
    for a, b in zip(found, expected, strict=True):
        assert a.bits == pytest.approx(b.bits, abs=1e-5)  # measured: 3.5e-7


@pytest.mark.parametrize("method", ["chunked", "plain"])
@pytest.mark.parametrize("eval_every", [1, 100])
def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_last_good_snapshot(
    tmp_path: Path, method: str, eval_every: int
) -> None:
    config = tiny(learning_rate=1e30, save_every=1, method=method, eval_every=eval_every)
    good = r"The last good snapshot is .*step-0000000\d"
    message = rf"^step \d: .*\. {good}\. Lower the learning rate, in a new run: slimgrad train --init .*$"
    with (
        pytest.raises(NonFiniteError, match=message) as raised,
        RunFolder.create(tmp_path / "run", "fox", {"config": config.to_dict()}) as folder,
    ):
        train(config, corpus(), run=folder)
    model, _ = open_model(tmp_path / "run")
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert len(generate(model, b"a", 5, temperature=1.0)) == 5
    failed = int(str(raised.value).removeprefix("step ").partition(":")[0])
    rows = read_rows(tmp_path / "run")
    assert [row.step for row in rows] == list(range(1, failed))
    assert all(math.isfinite(row.bits) for row in rows)


def test_a_model_that_is_no_number_from_the_start_has_no_good_snapshot(tmp_path: Path) -> None:
    model = build_model(tiny())
    torch.nn.init.constant_(model.head.weight, 3e38)
    with (
        pytest.raises(NonFiniteError, match=r"^step 1: .*There is no good snapshot before it\. Lower"),
        RunFolder.create(tmp_path / "run", "fox", {"config": tiny().to_dict()}, model) as folder,
    ):
        train(tiny(), corpus(), run=folder)
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["diverged-step-00000000"]


def test_a_full_disk_names_the_last_good_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimgrad.runs import snapshot

    config = tiny(steps=6, save_every=1)
    push, calls = snapshot.push_to_disk, 0

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(28, "No space left on device")
        push(path)

    monkeypatch.setattr(snapshot, "push_to_disk", full)
    message = r"step-00000002: .*No space left.*The last good snapshot is .*step-00000001\. Go on from there: --resume"
    with (
        pytest.raises(StorageError, match=message),
        RunFolder.create(tmp_path / "run", "fox", {"config": config.to_dict()}) as folder,
    ):
        train(config, corpus(), run=folder)
    monkeypatch.undo()
    assert going_on(tmp_path / "run", corpus())[-1].step == 6


def test_the_weights_to_begin_with_are_used(tmp_path: Path) -> None:
    whole(tmp_path / "run", tiny(steps=20), corpus())
    model, _ = open_model(tmp_path / "run")
    begun = train(tiny(steps=1), corpus(), weights=model.state_dict()).rows[0].bits
    assert begun < train(tiny(steps=1), corpus()).rows[0].bits - 1


def test_a_snapshot_of_another_shape_is_refused(tmp_path: Path) -> None:
    whole(tmp_path / "run", tiny(steps=2), corpus())
    other = dataclasses.replace(TINY_MODEL, width=32)
    with RunFolder.reopen(tmp_path / "run") as folder, pytest.raises(InputError, match="width 16 instead of 32"):
        train(tiny(model=other), corpus(), run=folder)
