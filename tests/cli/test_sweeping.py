"""A gradient that takes long, on the terminal and in a log; stopped, and gone on with."""

from __future__ import annotations

import io
import itertools
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from slimgrad import Event
from slimgrad.bytelm import TrainConfig
from slimgrad.bytelm.journalled import Pace
from slimgrad.cli import sweeping
from slimgrad.cli.sweeping import SweepBar
from slimgrad.models import PerformerConfig
from tests.cli.running import TINY, measured, run, succeed

LENGTH, CHUNK = 1000, 10
CONFIG = TrainConfig(
    model=PerformerConfig(layers=2, width=8, heads=1), length=LENGTH, chunk=CHUNK, steps=1, learning_rate=1.0, batch=3
)


def gradient() -> Iterator[Event]:
    """What is heard of one."""
    for start in range(0, LENGTH - CHUNK, CHUNK):
        yield Event("forward", start, start + CHUNK, LENGTH, None, 0, None)
    for start in range(LENGTH - CHUNK, -1, -CHUNK):
        yield Event("again", 0, CHUNK, LENGTH, None, 0, None)
        yield Event("reverse", start, start + CHUNK, LENGTH, 1.0, 0, 1.0)


def heard(monkeypatch: pytest.MonkeyPatch, *, seconds: float, terminal: bool, gradients: int = 1) -> list[str]:
    """What the bar says, or the lines that are written, where each chunk takes so long."""
    now, said = 0.0, list[str]()
    monkeypatch.setattr(sweeping, "perf_counter", lambda: now)
    monkeypatch.setattr(sweeping, "resident_bytes", lambda: 5_000_000)
    text = io.StringIO()
    with Progress(console=Console(file=text, force_terminal=terminal, width=200), auto_refresh=False) as progress:
        bar = SweepBar(progress, CONFIG)
        for event in itertools.chain.from_iterable(gradient() for _ in range(gradients)):
            now += seconds
            bar(event)
            said += [task.description for task in progress.tasks]
        assert progress.tasks == []
    return said if terminal else [line for line in text.getvalue().splitlines() if line]


def test_a_bar_shows_the_sweep_the_speed_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said = heard(monkeypatch, seconds=1.0, terminal=True, gradients=2)
    assert said[0] == "forward 120 of 3,000 bytes  30 bytes/s  5 MB"
    back = [words for words in said if words.startswith("back")]
    assert back[-1] == "back 2,970 of 3,000 bytes  15 bytes/s  5 MB"  # beside each chunk another is run again
    assert said.count(said[0]) == 2


def test_a_short_gradient_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heard(monkeypatch, seconds=0.001, terminal=True, gradients=3) == []


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heard(monkeypatch, seconds=0.1, terminal=False) == []
    lines = heard(monkeypatch, seconds=5.0, terminal=False)
    assert 15 <= len(lines) <= 20
    assert lines[1].startswith("gradient: forward 600 of 3,000 bytes  6 bytes/s")


@pytest.mark.skipif(os.name != "posix", reason="os.kill delivers signals on POSIX alone")
def test_stopped_in_a_gradient_it_goes_on_from_there(
    fox: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, count = tmp_path / "run", 0

    def interrupt(_: Event) -> None:
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("slimgrad.bytelm.loop.Pace", lambda: Pace(first=0, costs=0, least=0))
        patch.setattr("slimgrad.cli.session.SweepBar", lambda *_: interrupt)
        result = run("train", fox, *TINY, "--out", out)
    hint = f"slimgrad train --resume {out}"
    assert result.exit_code == 143
    assert result.stderr == (
        f"slimgrad: interrupted; the gradient at hand is saved, 75% of it done; saved after step 0. Go on: {hint}\n"
    )
    resumed = " ".join(succeed(*shlex.split(hint)[1:]).stdout.split())
    assert "the gradient of step 1 from where it was saved, with its own chunk and schedule" in " ".join(
        resumed.split()
    )
    assert measured(out) == measured(trained)
