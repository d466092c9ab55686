"""`slimgrad reproduce --quick`: whole, resumable, and with a report that needs no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimgrad.experiments.compatibility import compare, compatibility_points


def reproduce(*arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "slimgrad", "reproduce", *arguments]
    if not (Path(__file__).parents[2] / "src/slimgrad/__main__.py").exists():
        command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "reproduce", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_quick_from_nothing_then_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reproduce("--quick", "--out", str(out))
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
    assert "0:00:00 left" in reproduce("--quick", "--out", str(out))
    assert written == {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "found {'scale'" in reproduce("--out", str(out), status=2)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert "copying, ptb" in reproduce("--only", "speech", "--out", str(tmp_path / "out"), status=2)
    assert "at most 1" in reproduce("--scale", "2", "--out", str(tmp_path / "out"), status=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "Name another folder" in reproduce("--quick", "--out", str(tmp_path / "mine"), status=2)


def test_published_settings_and_one_share_for_all() -> None:
    for task, steps in (("copying", 15_000), ("ptb", 30_000)):
        full = compatibility_points(task, scale=1.0)
        assert {point.task["config"]["steps"] for point in full} == {steps}
        short = compatibility_points(task, scale=0.05)
        assert {point.task["config"]["steps"] for point in short} == {steps // 20}
        assert len({point.file for point in (*full, *short)}) == 12
