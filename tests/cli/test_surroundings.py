"""What surrounds a run: terminals and pipes that go away, encodings, names, other people's settings, its own folder."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from slimgrad.bytelm import Cost, RunFolder
from slimgrad.cli import session
from tests.cli.running import (
    FAILED,
    FOX,
    LENGTH,
    SHAPE,
    SIZE,
    TINY,
    measured,
    refuse,
    rows,
    run,
    snapshots,
    succeed,
)

PROGRAM = (sys.executable, "-c", "from slimgrad.cli import main; main()")
TRAIN = (*map(str, TINY), "--no-compare")


def child(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own."""
    given = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "timeout": 300} | options
    return subprocess.run([*PROGRAM, *map(str, arguments)], check=False, **given)


# --- standard output ---


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_run_goes_on_without_a_screen_and_says_so_once(fox: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = child("train", fox, *TRAIN, "--out", tmp_path / "run", stdout=full)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"slimgrad: standard output: No space left on device. The run goes on without it\n"
    assert len(rows(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "sample.txt").exists()


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize("place", ["a pipe that nobody reads", "a full disk"])
def test_what_is_only_there_to_be_read_ends_with_one_message(
    place: str, command: str, trained: Path, fox: Path
) -> None:
    if place == "a full disk":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        writing, words = os.open("/dev/full", os.O_WRONLY), b"No space left on device"
    else:
        reading, writing = os.pipe()
        os.close(reading)
        words = b"Broken pipe"
    try:
        done = child(command, trained, *([fox] if command == "eval" else []), stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b"slimgrad: standard output: expected to write to it, got: " + words + b"\n"


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names of any bytes")
def test_encodings_names_and_plotting_backends_of_elsewhere(tmp_path: Path) -> None:
    """A terminal that knows ASCII alone, a name that is no text and holds markup, a backend that is not there."""
    text, out = tmp_path / os.fsdecode(b"\xff$x_{[red].txt"), tmp_path / "run"
    text.write_bytes("naïve — 木 \N{SNOWMAN} ".encode() * 200)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "MPLBACKEND": "module://of_a_notebook"}
    done = child("train", text, *TRAIN, "--out", out, stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"left out" not in done.stdout
    assert b"Sample" in done.stdout
    assert (out / "sample.txt").exists()
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that are closed")
def test_a_closed_terminal_saves(fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", str(fox), *TRAIN, "--steps", "100000", "--eval-every", "100000", "--out", str(out)]
    process = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 129, stderr
    assert "saved after step" in stderr
    assert snapshots(out)


# --- what comes at the end ---


@pytest.mark.parametrize(("function", "what"), [("picture", "the curve"), ("generate", "the sample")])
def test_what_comes_at_the_end_stands_by_itself(
    function: str, what: str, fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("[red] is no colour")

    monkeypatch.setattr(f"slimgrad.cli.session.{function}", fail)
    shown = succeed("train", fox, *TINY, "--out", tmp_path / "run").stdout
    assert f"{what}: left out, since ValueError: [red] is no colour" in shown
    assert "everything is in" in shown
    assert (tmp_path / "run" / ("sample.txt" if what == "the curve" else "curve.png")).exists()
    assert (tmp_path / "run" / "memory.json").exists()


def test_the_comparison_is_made_once_and_only_where_it_is_wanted(
    fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs: list[str] = []

    def measure(*_: object, method: str, **__: object) -> Cost:
        costs.append(method)
        return Cost(peak_bytes=200 if method == "chunked" else 100, seconds=1.0)

    monkeypatch.setattr("slimgrad.cli.session.measure_gradient", measure)
    succeed("train", fox, *TINY, "--no-compare", "--out", tmp_path / "without")
    assert not costs
    shown = succeed("train", fox, *TINY, "--out", tmp_path / "run").stdout
    assert costs == ["chunked", "plain"]
    assert "the same gradient in" not in shown  # it takes more here
    succeed("train", "--resume", tmp_path / "run")
    assert costs == ["chunked", "plain"]
    monkeypatch.setattr("slimgrad.cli.session.free_bytes", lambda _: 1_000_000_000)
    shown = succeed("train", fox, *TINY, "--out", tmp_path / "short").stdout
    assert "is not compared with plain backpropagation, which may take 2,000 MB: 1,000 MB are free" in shown
    assert costs == ["chunked", "plain"]


def test_a_log_has_a_line_a_minute_unwrapped(fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SAID_EVERY", 0.0)
    shown = succeed("train", fox, *TINY, "--out", tmp_path / "run").stdout
    lines = [line for line in shown.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step ", line)]
    assert len(lines) == 6
    assert re.search(r"step 6 of 6  [\d.]+ bits/byte  [\d,]+ bytes/s  [\d,]+ MB  0:00:00 left$", lines[-1])
    (corpus,) = [line for line in shown.splitlines() if line.startswith("corpus")]
    assert corpus.rstrip().endswith("from all over it")  # a long line, in one piece


# --- the corpus ---


def test_a_run_is_no_part_of_its_own_corpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.txt").write_bytes(FOX)
    out = tmp_path / "deep" / "run"
    succeed("train", tmp_path, *TINY, "--out", out)
    recorded = json.loads((out / "config.json").read_text())["corpus"]
    assert recorded["bytes"] == [len(FOX)]
    succeed("train", "--resume", out)
    assert f"what a run writes is no part of the corpus, and left out: {out}" in caplog.text


def test_bytes_that_are_not_plain_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "text"
    for content, kind in ((FOX.decode().encode("utf-16"), "UTF-16 text"), (b"PK\x03\x04" + FOX, "a zip archive")):
        path.write_bytes(content)
        run("train", path, *SHAPE, "--length", LENGTH, "--chunk", 16, "--steps", 1, "--out", tmp_path / kind)
        assert f"{path} looks like {kind}" in caplog.text


def test_standard_input_cannot_be_trained_on(trained: Path) -> None:
    assert "Write it to a file first" in refuse(2, "train", "-", *TINY)
    assert succeed("eval", trained, "-", stdin=FOX).stdout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_cannot_be_trained_on(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "found a pipe, and a text is read more than once" in refuse(2, "train", pipe, *TINY)


# --- what is asked for ---


def test_one_number_by_two_names_is_refused(trained: Path, fox: Path) -> None:
    assert "--steps and --set steps=...: expected one of them" in refuse(
        2, "train", fox, *SHAPE, "--steps", 2, "--set", "steps=3"
    )
    message = refuse(2, "generate", trained, "--prompt", "a", "--prompt-file", fox)
    assert "--prompt and --prompt-file: expected one of them" in message
    assert "--tokens -1: expected zero or more" in refuse(2, "generate", trained, "--tokens", -1)


def test_a_run_is_verified_by_its_shape(trained: Path) -> None:
    assert re.search(r"its shape: .*exact", succeed("verify", trained, "--length", 40, "--chunk", 9).stdout)


def test_a_file_and_a_name_that_is_too_long_are_called_so(fox: Path, tmp_path: Path) -> None:
    assert "expected the folder of a run, found a file" in refuse(2, "train", "--resume", fox)
    long = tmp_path / ("a" * 300)
    for command in (
        ("train", fox, *TINY, "--out", long), ("train", long, *TINY), ("train", "--resume", long), ("eval", long, fox),
        ("generate", long), ("finetune", long, fox), ("train", fox, *TINY, "--init", long),
    ):  # fmt: skip
        assert "File name too long" in refuse(2, *command)


def test_what_no_machine_has_memory_for_is_one_message(fox: Path, tmp_path: Path) -> None:
    wide = (*SIZE, "--set", "model.width=4000000000", "--set", "model.heads=2", "--out", tmp_path / "run")
    assert "memory ran out" in refuse(1, "train", fox, *wide)
    few = ("--set", "model.vocabulary=100", "--out", tmp_path / "run")
    assert "model.vocabulary=100: expected 256 at least" in refuse(2, "train", fox, *TINY, *few)
    assert "model.vocabulary=100: expected 256 at least" in refuse(2, "train", "copying", *TINY, *few)


def test_threads_that_cannot_start_are_one_message(fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    message = refuse(1, "train", fox, *TINY, "--out", tmp_path / "run")
    assert "can't start new thread: memory or processes are limited to less than a run takes (ulimit)" in message


def test_an_evaluation_that_is_interrupted_says_what_it_has(
    trained: Path, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimgrad.cli import evaluating

    whole = evaluating.evaluate_stream

    def interrupted(*args: Any, report: Any, **options: Any) -> Any:
        def once(so_far: Any) -> None:
            report(so_far)
            raise KeyboardInterrupt

        return whole(*args, report=once, **options)

    monkeypatch.setattr(evaluating, "evaluate_stream", interrupted)
    result = run("eval", trained, fox, "--chunk", 64)
    assert result.exit_code == 130
    assert re.search(r"^[\d.]+ bits per byte: .* as one sequence, interrupted$", result.stdout, re.MULTILINE)


# --- file systems, folders, libraries ---


def test_a_folder_that_is_moved_under_a_run_is_not_called_a_full_disk(
    fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    steps = 0
    as_added = RunFolder.add

    def add(run: RunFolder, row: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            out.rename(moved)
        as_added(run, row)

    monkeypatch.setattr(RunFolder, "add", add)
    message = refuse(FAILED, "train", fox, *TINY, "--out", out)
    assert "is gone: it was moved, renamed or removed meanwhile. Put it back" in message
    assert "Free some space" not in message
    monkeypatch.undo()
    succeed("train", "--resume", moved)


def test_a_file_system_that_cannot_push_folders_or_lock_will_do(
    fox: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_pushed = os.fsync

    def push(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        as_pushed(descriptor)

    def acquire(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "fsync", push)
    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    out = tmp_path / "run"
    succeed("train", fox, *TINY, "--out", out)
    assert measured(out) == measured(trained)
    assert f"{out}: this file system has no locks" in caplog.text


def test_what_kernels_were_told_is_recorded_and_a_difference_said(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("MKL_VERBOSE", "0")
    said = " ".join(succeed("train", "--resume", snapshots(mine)[0]).stdout.split())
    # this process may have been told something else (OPENBLAS_...)
    assert re.search("bits may differ from an undisturbed run: kernels .* is now MKL_CBWR=COMPATIBLE", said)
