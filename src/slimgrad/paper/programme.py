"""A programme of measurements: points, each in a process of its own, that are never done twice.

A point is a function by name and the JSON that it is called with. Its process works in the programme's folder, OUT. Its
row is a file of its own in `OUT/points`, written whole; the file's name holds a checksum of the task, so a changed task
is another point. A point that failed leaves a row that says why, and is tried again the next time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimgrad.budget.measure import call_in_child
from slimgrad.errors import RunError
from slimgrad.paper.machine import describe_machine
from slimgrad.runs.files import write_atomically
from slimgrad.runs.stopping import Stop

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement.

    Attributes:
        experiment: the experiment that it belongs to.
        name: what is measured, for people; unique within the experiment.
        function: "module:name" of a function that takes `task` as keywords and returns a JSON dictionary.
        task: its arguments, plain enough for JSON.
        seconds: roughly how long it takes on two cores: for the time left alone.
        environment: what its process has set beside this one's own environment, as the settings of malloc.
        needs: what an earlier point must have been, for this one to be what it is: the configuration of the run whose
            model it takes. Where that changes, this is another point.
        labels: what it is to the tables and figures: they read nothing out of its name.
    """

    experiment: str
    name: str
    function: str
    task: Row
    seconds: float
    environment: dict[str, str] = field(default_factory=dict[str, str])
    needs: Row | None = None
    labels: Row = field(default_factory=dict[str, Any])

    @property
    def file(self) -> str:
        """The name of the row's file."""
        extra = [part for part in (self.environment, self.needs) if part]
        what = json.dumps([self.function, self.task, *extra], sort_keys=True)
        words = re.sub(r"[^A-Za-z0-9]+", "-", f"{self.experiment} {self.name}").strip("-")
        return f"{words}-{hashlib.sha256(what.encode()).hexdigest()[:8]}.json"


@dataclass(frozen=True, kw_only=True)
class Done:
    """Where a programme stands, told before each point and once at the end (`point` is None then).

    `done` counts the points before it in the programme's order.
    """

    done: int
    total: int
    seconds_left: float
    seconds_total: float
    point: Point | None


def run_points(
    points: list[Point], out: Path, report: Callable[[Done], None], stop: Stop, data_dir: Path | None = None
) -> list[Row]:
    """Do the points that have no good row yet, in order, and return the rows of all.

    Args:
        points: what to do.
        out: the programme's folder.
        report: told before each point.
        stop: asked whether a signal has come.
        data_dir: where the files of named corpora lie; handed to points whose task has a `corpus`.

    Raises:
        Interrupted: a signal came. The rows so far are kept; what a point was at is lost, except in training runs.
        StorageError: a row cannot be written.
    """
    folder = out / "points"
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(point.seconds for point in points)
    speed = 1.0  # seconds taken over seconds expected, so far
    taken = expected = 0.0
    for index, point in enumerate(points):
        if _good(folder / point.file):
            continue
        left = sum(p.seconds for p in points_left(points[index:], out))
        report(_done(index, points, left * speed, total * speed, point))
        began = time.perf_counter()
        row = _run(point, out, stop, data_dir)
        row["seconds"] = time.perf_counter() - began
        write_atomically(folder / point.file, (json.dumps(row, indent=1) + "\n").encode())
        taken, expected = taken + row["seconds"], expected + point.seconds
        speed = taken / expected
    report(_done(len(points), points, 0.0, total * speed, None))
    return rows_so_far(points, out)


def points_left(points: list[Point], out: Path) -> list[Point]:
    """Those that have no good row yet."""
    return [point for point in points if not _good(out / "points" / point.file)]


def rows_so_far(points: list[Point], out: Path) -> list[Row]:
    """The rows of those points that were done, or tried."""
    files = ((point, out / "points" / point.file) for point in points)
    return [
        json.loads(file.read_text(encoding="utf-8")) | {"labels": point.labels}
        for point, file in files
        if file.exists()
    ]


def _done(index: int, points: list[Point], left: float, total: float, point: Point | None) -> Done:
    return Done(done=index, total=len(points), seconds_left=left, seconds_total=total, point=point)


def _run(point: Point, out: Path, stop: Stop, data_dir: Path | None) -> Row:
    """The point in a fresh Python that works in the programme's folder."""
    row: Row = {"experiment": point.experiment, "name": point.name, "task": point.task}
    if point.environment:
        row["environment"] = point.environment
    where = {"data_dir": str(data_dir.absolute())} if data_dir and "corpus" in point.task else {}
    call = {"function": point.function, "task": point.task | where}
    try:
        with stop.interruptible():
            return row | call_in_child(f"{__name__}:measured", call, environment=point.environment, folder=out)
    except RunError as error:
        return row | {"error": str(error)}


def measured(*, function: str, task: Row) -> Row:
    """In the child: the result of a point's function, beside what it was measured on."""
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**task)
    return {"result": result, "machine": describe_machine()}


def _good(file: Path) -> bool:
    try:
        return "result" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
