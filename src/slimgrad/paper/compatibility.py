"""Backward compatibility (paper, section 4.3): plain, chunked, and half of each.

All regimes of a task have one seed and one order of data. Plain runs with other seeds are the noise that a difference
between regimes is to be held against. The first half of the mixed regimes is the plain run's own.
"""

from __future__ import annotations

import math
import statistics

from slimgrad.bytelm import TrainConfig
from slimgrad.bytelm.presets import get_preset
from slimgrad.data import END
from slimgrad.errors import InputError
from slimgrad.paper.programme import Point, Row

EXPERIMENT = "compatibility"
CHUNKS = {"copying": (128, 64), "ptb": (512, 256), "enwik8": (2048, 1366), "books": (2048, 1366)}
# what a task takes unless told otherwise: what two cores can do of it (enwik8's and the books' 5 % take days there)
SHARES = {"copying": 1.0, "ptb": 0.05, "enwik8": 0.05, "books": 0.05}
_PRESETS = {"books": "enwik8"}  # where enwik8 is not at hand, books stand in for it, under their own name
_NOISE_SEEDS = {"copying": (1, 2, 3, 4, 5, 6), "ptb": (1,), "enwik8": (1,), "books": (1,)}
_SECONDS_PER_STEP = {"copying": 0.05, "ptb": 0.8, "enwik8": 12.0, "books": 12.0}
_VALIDATIONS = 30
_LEAST_APART = 10  # steps between validations: one takes as long as several steps


def compatibility_points(task: str, *, scale: float | None = None, length: int = 0) -> list[Point]:
    """The runs of one task, at `scale` of the published steps each.

    Args:
        task: one of `CHUNKS`.
        scale: share of the published steps, above 1 for longer runs; None: that of `SHARES`.
        length: another length than the published one, for a quick look; chunks shrink with it.

    Raises:
        InputError: the scale is not a positive number.
    """
    scale = SHARES[task] if scale is None else scale
    if not 0 < scale < math.inf:
        raise InputError(f"--scale {scale}: expected a share of the published steps, above 0 (2 trains twice as long)")
    preset = preset_of(task)
    steps = max(2, 2 * round(preset.steps * scale / 2))
    shrink = preset.length // length if length else 1
    plain = plain_run(task)

    def point(regime: str, chunk: int, seed: int) -> Point:
        config = preset.replace(
            steps=steps,
            length=preset.length // shrink,
            method="plain" if regime == "plain" else "chunked",
            chunk=chunk,
            seed=seed,
            validation=END,  # as it was held out when these were measured; most have a part of their own
            eval_every=min(max(_LEAST_APART, steps // _VALIDATIONS), steps),
            save_every=max(1, steps // 20) if steps % 20 == 0 else 1 if steps < 20 else steps // 2,
        )
        labels: Row = {"task": task, "regime": regime, "chunk": chunk, "seed": seed}
        name = regime_name(labels)
        arguments: Row = {"folder": f"runs/{task}-{name}", "config": config.to_dict()}
        if task != "copying":
            arguments["corpus"] = task
        if regime == "half":
            arguments["first_half"] = plain
        arguments["keep_half"] = regime == "plain" and seed == 0
        return Point(
            experiment=EXPERIMENT,
            name=f"{task} {name}",
            labels=labels,
            function="slimgrad.paper.regimes:train_regime",
            task=arguments,
            seconds=_SECONDS_PER_STEP[task] * steps * (0.5 if regime == "half" else 1) / shrink,
        )

    chunks = [chunk // shrink for chunk in CHUNKS[task]]
    whole = preset.length // shrink
    mixed = [point(regime, chunk, 0) for regime in ("chunked", "half") for chunk in chunks]
    noise = [point("plain", whole, seed) for seed in (_NOISE_SEEDS[task][:1] if length else _NOISE_SEEDS[task])]
    return [point("plain", whole, 0), *mixed, *noise]


def preset_of(task: str) -> TrainConfig:
    """The published settings that a task has."""
    return get_preset(_PRESETS.get(task, task))


def plain_run(task: str) -> str:
    """The folder of the task's plain run, within the programme's."""
    return f"runs/{task}-plain-seed0"


def compare(rows: list[Row]) -> list[Row]:
    """Each run beside the plain one of its task: how far its curve is from it, in bits: at most, mean, median.

    Runs with another seed are the noise: `of_noise` is the mean over the mean of their means.
    """
    plain = {row["labels"]["task"]: row["result"] for row in rows if _is_reference(row["labels"])}
    table: list[Row] = []
    for row in rows:
        labels, result, config = row["labels"], row["result"], row["task"]["config"]
        reference = plain.get(labels["task"])
        entry: Row = {
            "task": labels["task"],
            "regime": regime_name(labels),
            "way": labels["regime"],
            "seed": labels["seed"],
            "length": config["length"],
            "steps": config["steps"],
            "share": config["steps"] / preset_of(labels["task"]).steps,
            "final_bits": result["final_bits"],
            "final_accuracy": result["final_accuracy"],
            "minutes": result["seconds"] / 60,
            "curve_largest": math.nan,
            "curve_mean": math.nan,
            "curve_median": math.nan,
            "validation_largest": math.nan,
        }
        if reference is not None and reference["steps"] == result["steps"]:
            training = [abs(a - b) for a, b in zip(result["bits"], reference["bits"], strict=True)]
            entry["curve_largest"], entry["curve_mean"] = max(training), statistics.mean(training)
            entry["curve_median"] = statistics.median(training)
            pairs = zip(result["validation_bits"], reference["validation_bits"], strict=True)
            entry["validation_largest"] = max(abs(a - b) for a, b in pairs)
        table.append(entry)
    for entry in table:
        seeds = [
            other["curve_mean"]
            for other in table
            if other["task"] == entry["task"] and other["way"] == "plain" and other["curve_mean"]
        ]
        entry["of_noise"] = entry["curve_mean"] / statistics.mean(seeds) if seeds else math.nan
    return table


def regime_name(labels: Row) -> str:
    """A regime for people: how, in which chunks, with which seed."""
    chunk = "" if labels["regime"] == "plain" else f"-{labels['chunk']}"
    return f"{labels['regime']}{chunk}-seed{labels['seed']}"


def _is_reference(labels: Row) -> bool:
    return (labels["regime"], labels["seed"]) == ("plain", 0)
