"""Every experiment by the name that the command line gives it, in the order in which the programme does them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from slimgrad.bytelm import TrainConfig
from slimgrad.errors import InputError
from slimgrad.paper import compatibility, finetuning, horizon, lengths, precision, tradeoff
from slimgrad.paper.programme import Point, Row
from slimgrad.paper.regimes import BOOKS

TASKS = tuple(compatibility.CHUNKS)
NAMES = (
    tradeoff.EXPERIMENT, precision.EXPERIMENT, *TASKS, finetuning.EXPERIMENT, horizon.EXPERIMENT, lengths.LENGTHS,
    lengths.SCHEDULES,
)  # fmt: skip
_LARGE = ("enwik8", BOOKS)  # configuration III: days on a CPU
_QUICK_SCALE, _QUICK_LENGTH = 0.002, 64
_SECONDS_PER_STRETCH = 1.0


def all_points(
    *, only: list[str], scale: float | None = None, quick: bool = False, data_dir: Path | None = None
) -> list[Point]:
    """The points of the programme.

    Args:
        only: names of `NAMES`; empty: all that fit this machine (a GPU: enwik8, or the books where enwik8 is not in
            `data_dir`; without one neither, unless named).
        scale: share of the published steps for every task; None: `compatibility.SHARES`.
        quick: small and short, on what Python itself carries.
        data_dir: where the files of corpora lie.
    """
    tasks = ["copying"] if quick else [task for task in TASKS if task in only or _fits(task, data_dir)]
    scale = _QUICK_SCALE if quick else scale
    length = _QUICK_LENGTH if quick else 0
    device = "cuda" if torch.cuda.is_available() and not quick else "cpu"
    made: dict[str, Callable[[], list[Point]]] = {
        tradeoff.EXPERIMENT: lambda: tradeoff.tradeoff_points(quick=quick, device=device),
        precision.EXPERIMENT: lambda: precision.precision_points(quick=quick),
        **{
            task: lambda task=task: compatibility.compatibility_points(task, scale=scale, length=length)
            for task in tasks
        },
        finetuning.EXPERIMENT: lambda: _finetuning(tasks, scale, quick, device),
        horizon.EXPERIMENT: lambda: horizon.horizon_points(quick=quick),
        lengths.LENGTHS: lambda: lengths.length_points(quick=quick),
        lengths.SCHEDULES: lambda: lengths.schedule_points(quick=quick),
    }
    points = [point for name, make in made.items() if not only or name in only for point in make()]
    return list({point.file: point for point in points}.values())  # what two experiments need is done once


def labelled(rows: list[Row]) -> list[Row]:
    """Rows of earlier versions, which had no labels, with those of the point of their name.

    Raises:
        InputError: no point of that name.
    """
    points = all_points(only=list(NAMES))
    labels = {(point.experiment, point.name): point.labels for point in points}
    unknown = [row["name"] for row in rows if "labels" not in row and (row["experiment"], row["name"]) not in labels]
    if unknown:
        raise InputError(f"{unknown[0]}: expected the name of a point, found none of that name in the programme")
    return [{"labels": labels.get((row["experiment"], row["name"]))} | row for row in rows]


def _fits(task: str, data_dir: Path | None) -> bool:
    if task not in _LARGE:
        return True
    stands_in = data_dir is not None and (data_dir / BOOKS).is_dir() and not list(data_dir.glob("enwik8*"))
    return torch.cuda.is_available() and task == (BOOKS if stands_in else "enwik8")


def _finetuning(tasks: list[str], scale: float | None, quick: bool, device: str) -> list[Point]:
    """The models that are adapted, with the points that train them; copying has no second half to read better."""
    if quick:
        first = precision.precision_points(quick=True)[0]
        config = TrainConfig.from_dict(first.task["config"])
        return [first, *finetuning.finetuning_points(
            "small", first.task["folder"], config, corpus=None, seconds=0.1, quick=True)]  # fmt: skip
    points: list[Point] = []
    for task in tasks:
        if task != "copying":
            trained = compatibility.compatibility_points(task, scale=scale)[0]
            config = TrainConfig.from_dict(trained.task["config"])
            points.append(trained)
            points += finetuning.finetuning_points(
                task, trained.task["folder"], config, corpus=task, device=device,
                seconds=_SECONDS_PER_STRETCH * config.length / 1024,
            )  # fmt: skip
    return points
