"""A run that is stopped: by a signal, by numbers that are none, by a disk that is full. Nothing is lost."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimgrad.runs.snapshot import read_snapshot
from tests.cli.running import TINY, everything, measured, refuse, rows, run, snapshots, succeed

PROGRAM = (sys.executable, "-c", "from slimgrad.cli import main; main()")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals between processes")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number: int, status: int, fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", str(fox), *map(str, TINY), "--steps", "100000", "--eval-every", "100000", "--out", str(out)]
    child = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while child.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        child.send_signal(number)
        _, stderr = child.communicate(timeout=120)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == status, stderr
    last = read_snapshot(snapshots(out)[-1])
    hint = f"slimgrad train --resume {out}"
    assert stderr == f"slimgrad: interrupted; saved after step {last.step:,}. Go on: {hint}\n"
    assert [row["step"] for row in rows(out)] == list(range(1, last.step + 1))
    before = everything(out)["metrics.jsonl"]
    seen = []

    def stop_soon(*_: object, **__: object) -> None:
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimgrad.cli.session.megabytes", lambda _: stop_soon() or "")
        result = run(*shlex.split(hint)[1:])
    assert result.exit_code == 130
    assert everything(out)["metrics.jsonl"].startswith(before)
    assert rows(out)[-1]["step"] == last.step + 2


@pytest.mark.parametrize("ending", ["picture", "generate"])
def test_an_interrupt_after_the_last_step_loses_nothing(
    ending: str, fox: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"slimgrad.cli.session.{ending}", interrupt)
        result = run("train", fox, *TINY, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr.startswith("slimgrad: interrupted")
    assert measured(tmp_path / "run") == measured(trained)
    succeed("train", "--resume", tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_snapshot(fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    message = refuse(1, "train", fox, *TINY, "--learning-rate", 1e30, "--save-every", 1, "--out", out)
    last = snapshots(out)[-1]
    assert read_snapshot(last).path == last
    assert "step " in message
    assert (
        f"The last good snapshot is {last}. Lower the learning rate, in a new run: slimgrad train --init {last} "
        in message
    )
    assert "learning rate" in message
    again = refuse(1, "train", "--resume", out)
    assert "step " in again
    assert snapshots(out)[-1] == last


def test_a_loss_that_is_no_number_in_the_first_step_says_so(
    fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimgrad.bytelm.loop.add_gradient", lambda *_, **__: float("nan"))
    message = refuse(1, "train", fox, *TINY, "--out", tmp_path / "run")
    assert "step 1: expected a finite loss and gradient, got loss nan" in message
    assert "There is no good snapshot before it" in message
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["diverged-step-00000000"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_full_disk_is_one_message_and_the_run_goes_on_later(fox: Path, trained: Path, tmp_path: Path) -> None:
    """No file may grow beyond what the first snapshot takes: the next one, with moments, does not fit."""
    out = tmp_path / "run"
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from slimgrad.runs import folder; save = folder.save_snapshot\n"
        "def limit(*args, step, **named):\n"
        "    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "    return save(*args, step=step, **named)\n"
        "folder.save_snapshot = limit\n"
        "from slimgrad.cli import main; main()"
    )
    command = [sys.executable, "-c", limited, "train", str(fox), *map(str, TINY), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("slimgrad: ")
    assert len(done.stderr.splitlines()) == 1
    last = snapshots(out)[-1]
    assert read_snapshot(last).step == 2
    assert f"The last good snapshot is {last}. Go on from there: --resume {out}" in done.stderr
    assert list((out / "snapshots").glob(".partial-*")) == []
    succeed("train", "--resume", out)
    assert measured(out) == measured(trained)


@pytest.mark.parametrize("name", ["config.json", "curve.png", "sample.txt", "memory.json"])
def test_a_file_that_cannot_be_written_is_one_message(
    name: str, fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.name.endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, content)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        message = refuse(1, "train", fox, *TINY, "--out", out)
    assert f"{out / name}: expected to write it, got: {os.strerror(errno.ENOSPC)}" in message
    if name != "config.json":
        succeed("train", "--resume", out)
        assert (out / name).exists()
