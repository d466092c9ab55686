"""`slimgrad train --resume`: what may change, what may not, and from where a run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import FOX, TINY, damage, everything, measured, refuse, rows, run, snapshots, succeed


def test_a_run_goes_on_from_an_older_snapshot_and_ends_as_it_did(mine: Path, trained: Path) -> None:
    result = succeed("train", "--resume", snapshots(mine)[0])
    assert "after step 4 of 6" in result.stdout
    assert measured(mine) == measured(trained)
    for before, after in zip(snapshots(trained), snapshots(mine), strict=True):
        assert everything(after) == everything(before)
    aside = [path.name for path in (mine / "snapshots").glob("superseded-*")]
    assert aside == ["superseded-step-00000006"]


def test_a_finished_run_that_goes_on_ends_well_again(mine: Path, trained: Path) -> None:
    result = succeed("train", "--resume", mine)
    assert "after step 6 of 6" in result.stdout
    assert rows(mine) == rows(trained)
    assert {path.name for path in snapshots(mine)} == {path.name for path in snapshots(trained)}
    assert [one["after_step"] for one in json.loads((mine / "config.json").read_text())["sessions"]] == [0, 6]


def test_a_run_without_a_snapshot_goes_on_from_its_first_step(mine: Path, trained: Path) -> None:
    shutil.rmtree(mine / "snapshots")
    assert "after step 0 of 6" in succeed("train", "--resume", mine).stdout
    assert measured(mine) == measured(trained)


def test_after_a_damaged_snapshot_the_one_before_goes_on(mine: Path, trained: Path) -> None:
    before, latest = snapshots(mine)
    damage(latest / "model.safetensors")
    assert str(before) in refuse(2, "train", "--resume", mine)
    succeed("train", "--resume", before)
    assert measured(mine) == measured(trained)
    succeed("train", "--resume", mine)


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "modern"),
        ("--length", 32),
        ("--windows", "random"),
        ("--batch", 2),
        ("--accumulate", 2),
        ("--precision", "bf16"),
        ("--learning-rate", 0.1),
        ("--eval-every", 2),
        ("--save-every", 2),
        ("--seed", 0),
        ("--set", "warmup=0"),
        ("--init", "elsewhere"),
        ("--out", "elsewhere"),
    ],
)
def test_what_may_not_change_is_named_and_the_run_left_as_it_is(options: tuple[object, ...], mine: Path) -> None:
    before = everything(mine)
    message = refuse(2, "train", "--resume", mine, *options)
    assert f"expected no {options[0]}. Only how gradients are computed may change" in message
    assert everything(mine) == before
    assert not Path("elsewhere").exists()


def test_several_that_may_not_change_are_all_named(mine: Path) -> None:
    message = refuse(2, "train", "--resume", mine, "--seed", 1, "--set", "warmup=0", "--batch", 3)
    assert "expected no --batch, no --seed, no --set." in message


@pytest.mark.parametrize(
    "how",
    [("--method", "plain"), ("--method", "checkpoint"), ("--chunk", 7), ("--schedule", "keep"), ("--device", "cpu")],
)
def test_how_gradients_are_computed_may_change(how: tuple[str, object], mine: Path, trained: Path) -> None:
    succeed("train", "--resume", snapshots(mine)[0], *how)
    assert [row["bits"] for row in rows(mine)] == pytest.approx([row["bits"] for row in rows(trained)], rel=1e-4)
    record = json.loads((mine / "config.json").read_text())
    assert record["sessions"][-1][how[0].removeprefix("--")] == how[1]


@pytest.mark.parametrize(
    "how",
    [("--method", "guessing"), ("--chunk", 0), ("--schedule", "sometimes"), ("--device", "tpu")],
)
def test_how_gradients_cannot_be_computed_is_refused_and_the_run_left_as_it_is(
    how: tuple[str, object], mine: Path
) -> None:
    before = everything(mine)
    assert "expected" in refuse(2, "train", "--resume", mine, *how)
    assert everything(mine) == before


@pytest.fixture
def moving(fox: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A text of its own, and a run of one step on it."""
    text = tmp_path / "text.txt"
    text.write_bytes(FOX)
    succeed("train", text, *TINY, "--out", tmp_path / "run")
    return text, tmp_path / "run"


def test_a_text_that_moved_is_refused_until_it_is_named(moving: tuple[Path, Path], tmp_path: Path) -> None:
    text, folder = moving
    moved = text.rename(tmp_path / "moved.txt")
    before = everything(folder)
    assert f"{text}: expected a file" in refuse(2, "train", "--resume", folder)
    assert everything(folder) == before
    succeed("train", moved, "--resume", snapshots(folder)[0])


@pytest.mark.parametrize("content", [FOX[:-1], FOX[:-1] + b"!", b"", b"short"])
def test_a_text_that_changed_is_refused_and_the_run_left_as_it_is(
    content: bytes, moving: tuple[Path, Path], tmp_path: Path
) -> None:
    text, folder = moving
    text.write_bytes(content)
    before = everything(folder)
    for path in (folder, snapshots(folder)[0]):
        message = refuse(2, "train", "--resume", path)
        assert str(text) in message
        assert "is empty" in message if not content else "slimgrad train CORPUS --resume RUN" in message
        assert everything(folder) == before


def test_another_text_is_refused(mine: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(FOX[:-1] + b"!")
    before = everything(mine)
    message = refuse(2, "train", other, "--resume", mine)
    assert f"corpus {other}: expected the {len(FOX):,} bytes that the run began with" in message
    assert everything(mine) == before


def test_a_run_goes_on_from_another_working_directory(
    fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fox.parent)
    succeed("train", fox.name, *TINY, "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    succeed("train", "--resume", "run")


def test_a_finished_run_whose_metrics_were_removed_ends_well_again(mine: Path) -> None:
    (mine / "metrics.jsonl").write_bytes(b"")
    succeed("train", "--resume", mine)
    assert "Sample" in succeed("train", "--resume", mine).stdout


def test_metrics_that_are_spoilt_are_refused_and_left_as_they_are(mine: Path) -> None:
    (mine / "metrics.jsonl").write_bytes(b"{\n")
    message = refuse(2, "train", "--resume", mine)
    assert "metrics.jsonl, line 1: expected the row of a step, in order, found what cannot be read. Mend it" in message
    assert (mine / "metrics.jsonl").read_bytes() == b"{\n"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))
    return (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda record: record["config"].update(steps=2),
            "in config.json at least the 6 steps that are done, found 2",
        ),
        (lambda record: record.update(sessions=3), "expected a list of sessions in config.json, found 3. Remove it"),
        (lambda record: record.update(corpus=None), "expected a record of the run's corpus in config.json, with its"),
        (lambda record: record.pop("corpus"), "expected a record of the run's corpus in config.json, with its"),
        (lambda record: record["corpus"].pop("sha256"), "expected a record of the run's corpus in config.json, with"),
        (lambda record: record.update(corpus="fox.txt"), "expected a record of the run's corpus in config.json, with"),
        (lambda record: record.update(plan="binomial"), "expected a plan as Plan.to_dict gives it, got 'binomial'"),
        (lambda record: record.update(config=[]), "expected the record of a run, it cannot be read"),
    ],
)
def test_a_record_that_was_edited_is_refused_and_left_as_it_is(
    change: Callable[[dict[str, Any]], object], message: str, mine: Path
) -> None:
    written = edit(mine, change)
    assert message in refuse(2, "train", "--resume", mine)
    assert (mine / "config.json").read_text() == written


def test_a_corpus_that_the_record_lost_is_named_and_recorded_again(mine: Path, fox: Path) -> None:
    before = json.loads((mine / "config.json").read_text())["corpus"]
    edit(mine, lambda record: record.update(corpus=None))
    succeed("train", fox, "--resume", mine)
    assert json.loads((mine / "config.json").read_text())["corpus"] == before


def test_numbers_that_were_edited_are_told_and_those_that_may_change_are_not(mine: Path, trained: Path) -> None:
    before = snapshots(mine)[0]
    edit(mine, lambda record: record["config"].update(seed=5, learning_rate=0.5, chunk=8))
    said = " ".join(succeed("train", "--resume", before).stdout.split())
    told = "config.json was edited, this is another run from here on: "
    assert f"{told}learning_rate 0.01 is now 0.5, seed 0 is now 5" in said
    assert measured(mine) != measured(trained)
    assert "was edited" not in succeed("train", "--resume", mine).stdout
    succeed("train", "--resume", mine, "--steps", 2, "--learning-rate", 0.001)
    assert "was edited" not in succeed("train", "--resume", mine).stdout


def test_a_run_that_another_process_works_on_is_refused(mine: Path) -> None:
    from slimgrad.bytelm import RunFolder

    with RunFolder.reopen(mine):
        before = everything(mine)
        assert "another process works on this run" in refuse(2, "train", "--resume", mine)
        assert everything(mine) == before
    assert run("train", "--resume", mine).exit_code == 0


def test_where_the_computer_differs_the_run_says_that_bits_may_too(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimgrad.runs.environment import describe_environment

    elsewhere = {**describe_environment(), "machine": "abacus"}
    monkeypatch.setattr("slimgrad.cli.resuming.describe_environment", lambda: elsewhere)
    shown = " ".join(succeed("train", "--resume", mine).stdout.split())
    assert "bits may differ from an undisturbed run: machine" in shown
    assert "is now abacus" in shown
