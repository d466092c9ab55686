"""A text, a preset that takes a second, and one run that tests may read but not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slimgrad.models import PRESETS
from slimgrad.train import Cost
from tests.cli.command import TINY, run
from tests.train.settings import TEXT


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "modern", TINY)


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimgrad.cli.session.measure_gradient", lambda *_, **__: Cost(peak_bytes=None, seconds=1.0))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_bytes(bytes(TEXT.tolist()))
    return path


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with a snapshot every other step."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "modern", TINY)
        patch.setattr("slimgrad.cli.session.measure_gradient", lambda *_, **__: Cost(peak_bytes=None, seconds=1.0))
        result = run("train", text, "--save-every", 2, "--out", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, to change."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))
