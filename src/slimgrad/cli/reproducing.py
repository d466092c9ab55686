"""`slimgrad reproduce`: the paper's experiments, point by point, and a report of them."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from slimgrad.errors import InputError, RunError
from slimgrad.paper.catalogue import NAMES, all_points
from slimgrad.paper.programme import Done, Point, points_left, rows_so_far, run_points
from slimgrad.paper.regimes import load_text
from slimgrad.paper.report import write_report
from slimgrad.runs.files import write_atomically
from slimgrad.runs.stopping import Interrupted, Stop

PROGRAMME = "programme.json"


def run_programme(
    *, only: list[str], scale: float | None, quick: bool, out: Path | None, data_dir: Path | None
) -> None:
    """Do what is left of the programme in `out`, and write the report."""
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise InputError(f"--only {unknown[0]}: expected one of {', '.join(NAMES)}")
    out = (out or Path("runs", "reproduce-quick" if quick else "reproduce")).absolute()
    points = all_points(only=only, scale=scale, quick=quick, data_dir=data_dir)
    if not points:
        raise InputError(f"--only {', '.join(only)}: no such part with --quick. Leave one of them out")
    settings: dict[str, object] = {"scale": scale, "quick": quick}
    _require_own(out, settings)
    for corpus in {point.task["corpus"]: None for point in points_left(points, out) if "corpus" in point.task}:
        load_text(corpus, data_dir)  # what is not there is said before any work
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / PROGRAMME, (json.dumps(settings) + "\n").encode())
    whole = all_points(only=[], scale=scale, quick=quick, data_dir=data_dir)
    console, command = Console(highlight=False), shlex.join(["slimgrad", *sys.argv[1:]])
    try:
        with FileLock(out / ".lock", timeout=0):
            try:
                with Stop().listening() as stop, _Display(console) as display:
                    rows = run_points(points, out, display.show, stop, data_dir)
            except Interrupted as interrupted:
                page = _report(points, whole, out, command)
                interrupted.add_note(
                    f"what is done is kept in {out}, and reported: {page}. Go on: the same command again"
                )
                raise
            page = _report(points, whole, out, command)
    except Timeout as error:
        raise InputError(f"--out {out}: another process works in it. Wait for it, or name another folder") from error
    failed = [row["name"] for row in rows if "result" not in row]
    console.print(f"\nThe report: [bold]{page}[/]", soft_wrap=True)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(rows)} points failed: {', '.join(failed)}. The report gives the reasons; the same "
            "command tries them again"
        )


def _report(points: list[Point], whole: list[Point], out: Path, command: str) -> Path:
    """A report of these points, and of whatever else of the programme was done in `out` before."""
    asked = {point.file for point in points}
    others = [p for p in whole if p.file not in asked and (out / "points" / p.file).exists()]
    every = {point.file: point for point in whole if point.file in asked or point in others}
    every |= {point.file: point for point in points}  # those that only this call named, last
    return write_report(rows_so_far(list(every.values()), out), out, command, total=len(every))


class _Display:
    """A line per point, and on a terminal a bar over the whole programme below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("")

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: Done) -> None:
        """Told before each point."""
        left = timedelta(seconds=round(done.seconds_left))
        what = f"{done.point.experiment} {done.point.name}" if done.point else "all done"
        self._console.print(f"{done.done:>3} of {done.total}  [bold]{what}[/], about {left} left")
        share = 1 - done.seconds_left / done.seconds_total if done.seconds_total else 1.0
        self._bar.update(self._task, completed=100 * share, description=f"{what}, about {left} left")


def _require_own(out: Path, settings: dict[str, object]) -> None:
    """A folder holds one programme: new, or begun with the same settings."""
    path = out / PROGRAMME
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise InputError(f"--out {out}: expected a programme with {settings}, found {found}. Name another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: expected a new folder or a programme begun before. Name another folder")
