"""A text, and one trained run that tests share as long as they only read it."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from slimgrad.bytelm import Cost
from tests.cli.running import FOX, TINY, succeed


@pytest.fixture(scope="session", autouse=True)
def _no_measuring() -> Generator[None]:
    """What a gradient takes is measured in processes of their own, and is the subject of one test alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimgrad.cli.session.measure_gradient", lambda *_, **__: Cost(peak_bytes=None, seconds=1.0))
        yield


@pytest.fixture(autouse=True)
def _short_endings(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the shared run: no picture, and a sample of few bytes."""
    monkeypatch.setattr("slimgrad.cli.session.picture", lambda *_: b"")
    monkeypatch.setattr("slimgrad.cli.session.SAMPLE_BYTES", 8)


@pytest.fixture(scope="session")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_bytes(FOX)
    return path


@pytest.fixture(scope="session")
def trained(fox: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with snapshots after steps 4 and 6. To be read, not written."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    succeed("train", fox, *TINY, "--out", folder)
    return folder


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "mine"))


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_bytes(FOX[: 90 + 45 * number])
    return folder
