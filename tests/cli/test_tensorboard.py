"""`slimgrad train --log`: every step once, also where a run went on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.running import TINY, everything, refuse, rows, snapshots, succeed


def steps(run: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_step_is_there_once_also_after_a_run_went_on(fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed("train", fox, *TINY, "--log", "tensorboard", "--out", out)
    for _ in range(2):
        bits = steps(out, "training/bits_per_byte")
        assert [step for step, _ in bits] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in bits] == pytest.approx([row["bits"] for row in rows(out)])
        validated = [row["step"] for row in rows(out) if row["validation_bits"] is not None]
        assert [step for step, _ in steps(out, "validation/bits_per_byte")] == validated
        succeed("train", "--resume", snapshots(out)[0], "--log", "tensorboard")


@pytest.fixture
def _hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else found(name))


@pytest.mark.usefixtures("_hidden")
def test_without_the_package_no_run_begins(fox: Path, tmp_path: Path) -> None:
    message = refuse(2, "train", fox, *TINY, "--log", "tensorboard", "--out", tmp_path / "run")
    assert "pip install 'slimgrad[tensorboard]'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_hidden")
def test_without_the_package_no_run_goes_on(mine: Path) -> None:
    before = everything(mine)
    for path in (mine, snapshots(mine)[0]):
        assert "pip install 'slimgrad[tensorboard]'" in refuse(2, "train", "--resume", path, "--log", "tensorboard")
        assert everything(mine) == before
