"""Whole training runs through the command line: three ways to one gradient, one seed, and curves that coincide.

    python -m benchmarks.training FILE...           # writes results/training.json

For each file: the modern preset by the three methods, and chunked once more with another seed (run-to-run noise); the
paper's architecture with as many parameters, trained on as many bytes in the same way, at two learning rates; and for
the first file, runs that change from plain to chunked at half of their steps, and the other way round, in two ways:
`--resume` from the snapshot at half, with another `--method`, and `--init` from the finished model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import save
from slimgrad.bytelm.config import TrainConfig
from slimgrad.bytelm.folder import read_record, read_rows
from slimgrad.bytelm.presets import get_preset
from slimgrad.bytelm.row import Row
from slimgrad.models import Performer

METHODS = ("plain", "checkpoint", "chunked")
# the paper's layers (square features, normaliser, one token embedded, layer norm on outputs) in the modern preset's
# width; its feed-forward is wider, so that both have 0.69 million parameters
PAPER = {
    "norm": "output", "feature_map": "square", "normalize": "true", "output_projection": "false", "taps": "1",
    "feedforward": "639",
}  # fmt: skip
PAPER_RATES = (1e-3, 3e-3)


def slimgrad(*arguments: object) -> None:
    """The command line, in a process of its own."""
    command = [sys.executable, "-c", "from slimgrad.cli import main; main()", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run(folder: Path, *arguments: object) -> list[Row]:
    """A new run in `folder`; one that was finished there before is not repeated."""
    if not (folder / "curve.png").exists():
        if (folder / "config.json").exists():
            slimgrad("train", "--resume", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            slimgrad("train", *arguments, "--validation", "end", "--out", folder)  # as the committed rows had it
    return read_rows(folder)


def difference(rows: Sequence[Row], other: Sequence[Row]) -> dict[str, float]:
    """How far two curves are apart, in bits per byte: training (largest, mean over steps) and validation (largest)."""
    steps = [abs(a.bits - b.bits) for a, b in zip(rows, other, strict=True)]
    validations = [
        abs(a.validation_bits - b.validation_bits)
        for a, b in zip(rows, other, strict=True)
        if a.validation_bits is not None and b.validation_bits is not None
    ]
    return {"largest": max(steps), "mean": sum(steps) / len(steps), "validation": max(validations)}


def summary(folder: Path, rows: Sequence[Row], **what: Any) -> dict[str, Any]:
    """One line of the results: the run's end, its validations, and its training curve in 40 points."""
    config = TrainConfig.from_dict(read_record(folder)["config"])
    last = rows[-1]
    every = max(1, len(rows) // 40)
    curve = [rows[i : i + every] for i in range(0, len(rows) - every + 1, every)]
    return {
        **what,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in Performer(config.model).parameters()),
        "learning_rate": config.learning_rate,
        "steps": config.steps,
        "bytes": last.bytes_seen,
        "minutes": round(last.seconds / 60, 2),
        "validation_bits": last.validation_bits,
        "validations": [[row.bytes_seen, row.validation_bits] for row in rows if row.validation_bits is not None],
        "training": [[part[-1].bytes_seen, sum(row.bits for row in part) / len(part)] for part in curve],
        "sample": (folder / "sample.txt").read_bytes().decode(errors="replace"),
    }


def one_corpus(file: Path, work: Path, steps: int) -> list[dict[str, Any]]:
    """The three methods, noise, and the paper's architecture."""
    name = file.stem
    numbers = ("--steps", steps, "--eval-every", max(1, steps // 16), "--save-every", steps // 2)
    runs = {method: run(work / f"{name}-{method}", file, *numbers, "--method", method) for method in METHODS}
    plain = runs["plain"]
    rows = [
        summary(
            work / f"{name}-{method}", curve, corpus=name, model="modern", method=method,
            from_plain=difference(curve, plain),
        )
        for method, curve in runs.items()
    ]  # fmt: skip
    again = run(work / f"{name}-seed", file, *numbers, "--seed", 1)
    noise = difference(again, plain)
    rows.append(
        summary(work / f"{name}-seed", again, corpus=name, model="modern", method="chunked", from_plain=noise)
    )  # fmt: skip
    for rate in PAPER_RATES:
        folder = work / f"{name}-paper-{rate:g}"
        settings = [word for pair in PAPER.items() for word in ("--set", "model.{}={}".format(*pair))]
        curve = run(folder, file, *numbers, "--learning-rate", rate, *settings)
        rows.append(summary(folder, curve, corpus=name, model="paper", method="chunked"))
    return rows


def switched(file: Path, work: Path, steps: int) -> list[dict[str, Any]]:
    """From one method to another at half: by `--resume` from the snapshot there, and by `--init`."""
    name, rows = file.stem, list[dict[str, Any]]()
    for before, after in (("plain", "chunked"), ("chunked", "plain")):
        origin, folder = work / f"{name}-{before}", work / f"{name}-{before}-then-{after}"
        if not (folder / "curve.png").exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(origin, folder)
            (folder / "curve.png").unlink()
            slimgrad("train", "--resume", folder / "snapshots" / f"step-{steps // 2:08d}", "--method", after)
        curve, whole = read_rows(folder), read_rows(origin)
        what = {"corpus": name, "model": "modern", "method": f"{before}, then {after}", "how": "--resume"}
        rows.append(summary(folder, curve, **what, from_uninterrupted=difference(curve, whole)))

        numbers = ("--init", origin, "--steps", steps // 4, "--set", "first_length=2048", "--learning-rate", 2e-3)
        curves: dict[str, list[Row]] = {}
        for method in (after, before):
            curves[method] = run(work / f"{name}-{before}-init-{method}", file, *numbers, "--method", method)
        folder = work / f"{name}-{before}-init-{after}"
        apart = difference(curves[after], curves[before])
        rows.append(summary(folder, curves[after], **(what | {"how": "--init"}), from_uninterrupted=apart))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=get_preset("modern").steps)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-training"), help="where the runs lie")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for file in given.files:
        rows += one_corpus(file, given.work, given.steps)
        save("training", rows)
    rows += switched(given.files[0], given.work, given.steps)
    save("training", rows)
    for row in rows:
        print(json.dumps({k: v for k, v in row.items() if k not in ("validations", "training", "sample")}))


if __name__ == "__main__":
    main()
