"""`slimgrad reproduce`: the paper's experiments, point by point, and a report of them."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from slimgrad.errors import InputError, RunError
from slimgrad.experiments.compatibility import CHUNKS, compatibility_points
from slimgrad.experiments.programme import Point, Progress, run_points
from slimgrad.experiments.report import write_report
from slimgrad.experiments.tradeoff import EXPERIMENT as TRADEOFF
from slimgrad.experiments.tradeoff import tradeoff_points
from slimgrad.train import Interrupted, Stop

PROGRAMME = "programme.json"
_QUICK_SCALE, _QUICK_LENGTH = 0.002, 64


def run_programme(*, only: list[str], scale: float, quick: bool, out: Path | None, data_dir: Path | None) -> None:
    """Do what is left of the programme in `out`, and write the report."""
    known = [TRADEOFF, *CHUNKS]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise InputError(f"--only {unknown[0]}: expected one of {', '.join(known)}")
    chosen = only or ([TRADEOFF, "copying"] if quick else known)
    if quick:
        scale = _QUICK_SCALE
    out = (out or Path("runs", "reproduce-quick" if quick else "reproduce")).absolute()
    length = _QUICK_LENGTH if quick else 0
    points: list[Point] = tradeoff_points(quick=quick) if TRADEOFF in chosen else []
    for task in chosen:
        if task == TRADEOFF:
            continue
        points += compatibility_points(task, scale=scale, length=length)
    _require_own(out, {"scale": scale, "quick": quick})
    console = Console(highlight=False)

    def report(progress: Progress) -> None:
        left = timedelta(seconds=round(progress.seconds_left))
        what = progress.point.name if progress.point else "all done"
        console.print(f"{progress.done:>3} of {progress.total}  [bold]{what}[/], about {left} left")

    try:
        with FileLock(out / ".lock", timeout=0):
            stop = Stop()
            with stop.listening():
                rows = run_points(points, out, report, stop, data_dir)
            page = write_report(rows, out, shlex.join(["slimgrad", *sys.argv[1:]]))
    except Interrupted as interrupted:
        interrupted.add_note(f"what is done is kept in {out}. Go on: the same command again")
        raise
    except Timeout as error:
        raise InputError(f"--out {out}: another process works in it. Wait for it, or name another folder") from error
    failed = [row["name"] for row in rows if "result" not in row]
    console.print(f"\nThe report: [bold]{page}[/]", soft_wrap=True)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(rows)} points failed: {', '.join(failed)}. The report gives the reasons; the same "
            "command tries them again"
        )


def _require_own(out: Path, settings: dict[str, object]) -> None:
    """A folder holds one programme: new, or begun with the same settings."""
    path = out / PROGRAMME
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise InputError(f"--out {out}: expected a programme with {settings}, found {found}. Name another folder")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: expected a new folder or a programme begun before. Name another folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
