"""`slimgrad reproduce --quick`: whole, resumable, and with a report that needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimgrad.experiments.compatibility import compare, compatibility_points
from slimgrad.experiments.regimes import train_regime
from slimgrad.models import get_preset
from slimgrad.train import config_for
from tests.cli.running import INPUT, refuse, succeed


@pytest.mark.slow
def test_quick_from_nothing_then_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    succeed("reproduce", "--quick", "--out", out)
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert len(rows) == 6
    table = {entry["regime"]: entry for entry in compare(rows)}
    noise = table["plain-seed1"]["curve_mean"]
    others = [entry["curve_mean"] for name, entry in table.items() if not name.startswith("plain")]
    assert len(others) == 4
    assert 0 < max(others) < noise / 100
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "src=" not in page
    assert "<link" not in page
    written = {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "0:00:00 left" in succeed("reproduce", "--quick", "--out", out).output
    assert written == {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "found {'scale'" in refuse(INPUT, "reproduce", "--out", out)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert "copying, ptb" in refuse(INPUT, "reproduce", "--only", "speech", "--out", tmp_path / "out")
    assert "at most 1" in refuse(INPUT, "reproduce", "--scale", 2, "--out", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "Name another folder" in refuse(INPUT, "reproduce", "--quick", "--out", tmp_path / "mine")


def test_published_settings_and_one_share_for_all() -> None:
    for task, steps in (("copying", 15_000), ("ptb", 30_000)):
        full = compatibility_points(task, scale=1.0)
        assert {point.task["config"]["steps"] for point in full} == {steps}
        short = compatibility_points(task, scale=0.05)
        assert {point.task["config"]["steps"] for point in short} == {steps // 20}
        assert len({point.file for point in (*full, *short)}) == 12


def test_a_first_half_survives_a_kill_before_its_copy(tmp_path: Path) -> None:
    config = config_for(get_preset("copying"), steps=4, length=16, chunk=4, save_every=2).to_dict()
    plain, half = tmp_path / "plain", tmp_path / "plain-half"
    undisturbed = train_regime(folder=str(plain), config=config, keep_half=True)
    first_half = {"folder": str(tmp_path / "mixed"), "config": config, "first_half": str(plain)}
    assert train_regime(**first_half)["bits"] == undisturbed["bits"]
    (tmp_path / "killed").mkdir()
    half.rename(tmp_path / "killed" / "plain")  # as a kill leaves it: the snapshot is there, its copy is not
    again = train_regime(folder=str(tmp_path / "killed" / "plain"), config=config, keep_half=True)
    assert again["bits"] == undisturbed["bits"]
    assert (tmp_path / "killed" / "plain-half" / "config.json").exists()
