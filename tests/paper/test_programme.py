"""Points run once, failures are rows and are tried again, and nothing that was done is done twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from slimgrad.paper.programme import Done, Point, rows_so_far, run_points
from slimgrad.runs.stopping import Stop

BROKEN = Point(
    experiment="arithmetic", name="two values", function="statistics:NormalDist", task={"mu": 1}, seconds=1
)  # a result that JSON cannot hold: fails
ROOT = Point(experiment="arithmetic", name="none", function="builtins:dict", task={"value": 3}, seconds=1)


def run(points: list[Point], out: Path) -> tuple[list[dict[str, object]], list[Done]]:
    seen: list[Done] = []
    return run_points(points, out, seen.append, Stop()), seen


def test_a_point_is_done_once(tmp_path: Path) -> None:
    rows, first = run([ROOT], tmp_path)
    assert rows[0]["result"] == {"value": 3}
    assert [p.point for p in first] == [ROOT, None]
    again, second = run([ROOT], tmp_path)
    assert again == rows
    assert [p.point for p in second] == [None]


def test_another_task_is_another_point(tmp_path: Path) -> None:
    run([ROOT], tmp_path)
    other = dataclasses.replace(ROOT, task={"value": 4})
    rows, _ = run([other], tmp_path)
    assert rows[0]["result"] == {"value": 4}


def test_a_failure_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    rows, _ = run([BROKEN, ROOT], tmp_path)
    assert "error" in rows[0]
    assert "result" not in rows[0]
    assert rows[1]["result"] == {"value": 3}
    _, again = run([BROKEN, ROOT], tmp_path)
    assert [p.point for p in again] == [BROKEN, None]


def test_a_torn_row_is_done_again(tmp_path: Path) -> None:
    run([ROOT], tmp_path)
    file = tmp_path / "points" / ROOT.file
    file.write_text(file.read_text()[:-20])
    rows, _ = run([ROOT], tmp_path)
    assert rows[0]["result"] == {"value": 3}


def test_what_is_done_can_be_had_before_the_end(tmp_path: Path) -> None:
    rows, _ = run([ROOT], tmp_path)
    assert rows_so_far([BROKEN, ROOT], tmp_path) == rows


def test_rows_say_what_they_were_measured_on(tmp_path: Path) -> None:
    rows, _ = run([ROOT], tmp_path)
    assert {"torch", "slimgrad", "threads"} <= json.loads(json.dumps(rows[0]["machine"])).keys()
