"""SIGKILL at any moment, then `--resume`: the run ends as an undisturbed one does, in every byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slimgrad.bytelm import RunFolder, TrainConfig, train
from slimgrad.bytelm.folder import read_record, read_rows
from slimgrad.data import load_corpus
from tests.bytelm.settings import TEXT, last_snapshot, timeless

KILLS = 10
# the command line as it is, but for the measuring of a gradient after the last step, which is not training
PROGRAM = """
from slimgrad.cli import main, session
from slimgrad.bytelm import Cost
session.measure_gradient = lambda *_, **__: Cost(peak_bytes=None, seconds=0.0)
main()
"""
COMMAND = [sys.executable, "-c", PROGRAM, "train"]
STEPS = 200  # more than ten kills let pass
NUMBERS = {"--length": 256, "--chunk": 64, "--steps": STEPS, "--save-every": 1, "--eval-every": 20, "--seed": 3}
FIELDS = ("validation_bytes=300", "model.width=32", "model.layers=1")
SETTINGS = [str(word) for pair in NUMBERS.items() for word in pair] + [w for field in FIELDS for w in ("--set", field)]


def start(*arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def sessions(run: Path) -> int:
    return len(read_record(run)["sessions"]) if (run / "config.json").exists() else 0


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_after(process: subprocess.Popen[bytes], reached: Callable[[], bool], seconds: float) -> None:
    while process.poll() is None and not reached():
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed: {said.decode()}"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_run_that_was_killed_ten_times_ends_as_if_undisturbed(tmp_path: Path) -> None:
    text = tmp_path / "fox.txt"
    text.write_bytes(bytes(TEXT.tolist()))
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    draw = random.Random(0)
    process = start(text, *SETTINGS, "--out", killed)
    for number in range(KILLS):
        if number % 2 == 0:  # while it takes up its work: its record is written first
            kill_after(process, lambda n=number: sessions(killed) > n, draw.uniform(0, 0.2))
        else:  # while it works: a snapshot takes about as long as a step, so a kill falls into either
            goal = draw.randint(1, 5)
            before = lines(killed)
            kill_after(process, lambda n=before + goal: lines(killed) >= n, draw.uniform(0, 0.05))
        process = start("--resume", killed)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    assert sessions(killed) == KILLS + 1

    config = TrainConfig.from_dict(read_record(killed)["config"])
    with RunFolder.create(undisturbed, "fox", {"config": config.to_dict()}) as folder:
        expected = train(config, load_corpus(text), run=folder).rows
    assert last_snapshot(killed) == last_snapshot(undisturbed)
    found = read_rows(killed)
    assert [row.step for row in found] == list(range(1, STEPS + 1))
    assert timeless(found) == timeless(expected)
    assert [row.seconds for row in found] == sorted(row.seconds for row in found)
    assert not list(killed.rglob(".partial-*"))
