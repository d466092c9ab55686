"""SIGKILL at any moment, then `--resume`: the run ends as an undisturbed one does, in every byte."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimgrad.train.folder import read_rows
from tests.train.settings import TEXT, timeless
from tests.train.test_snapshot import FILES

KILLS = 10
COMMAND = [sys.executable, "-c", "from slimgrad.cli import main; main()", "train"]
# a step takes some ten milliseconds, a snapshot of it as long: a kill falls into either
STEPS = 200
NUMBERS = {"--length": 256, "--chunk": 64, "--steps": STEPS, "--save-every": 1, "--eval-every": 50, "--seed": 3}
FIELDS = ("validation_bytes=300", "model.width=32", "model.layers=1")
SETTINGS = [str(word) for pair in NUMBERS.items() for word in pair] + [w for field in FIELDS for w in ("--set", field)]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def finish(arguments: list[str]) -> None:
    process = start(arguments)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


def files(run: Path) -> dict[str, bytes]:
    latest = sorted((run / "snapshots").glob("step-*"))[-1]
    return {name: (latest / name).read_bytes() for name in FILES}


def length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_a_run_that_was_killed_ten_times_ends_as_if_undisturbed(tmp_path: Path) -> None:
    text = tmp_path / "fox.txt"
    text.write_bytes(bytes(TEXT.tolist()))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish([str(text), *SETTINGS, "--out", str(undisturbed)])

    draw = random.Random(0)
    first = [str(text), *SETTINGS, "--out", str(killed)]
    process = start(first)
    for _ in range(KILLS):
        before = length(killed / "metrics.jsonl")
        while process.poll() is None and length(killed / "metrics.jsonl") <= before:
            time.sleep(0.01)  # until it has taken up its work
        time.sleep(draw.uniform(0, 0.25))
        process.kill()
        process.communicate()
        assert process.returncode == -9, "it ended before it could be killed: give it more steps"
        process = start(["--resume", str(killed)])
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()

    assert files(killed) == files(undisturbed)
    rows = read_rows(killed)
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert timeless(rows) == timeless(read_rows(undisturbed))
