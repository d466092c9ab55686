"""Each kind of text all the way: trained, killed, gone on with, evaluated, generated from, fine-tuned on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.cli.running import SHAPE, SIZE, config, measured, rows, succeed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
# the command as it is, but for what comes after the last step, and for a pause in each, in which it can be killed
PROGRAM = """
import time
from slimgrad.bytelm import Cost, folder
from slimgrad.cli import main, session
session.measure_gradient = lambda *_, **__: Cost(peak_bytes=None, seconds=0.0)
session.picture, session.SAMPLE_BYTES = lambda *_: b"", 8
add = folder.RunFolder.add
folder.RunFolder.add = lambda *arguments: (add(*arguments), time.sleep(0.1))[0]
main()
"""
STEPS, KILLED_AFTER = 9, 3
NUMBERS = (*SHAPE, *SIZE, "--steps", STEPS, "--save-every", 2, "--learning-rate", 0.01)
WORDS = ("the", "fox", "jumps", "over", "a", "lazy", "dog", "and", "quickly", "sleeps")


def sentences(number: int) -> str:
    draw = random.Random(number)
    return "".join(" ".join(draw.choices(WORDS, k=9)).capitalize() + ".\n" for _ in range(12))


def book(path: Path) -> None:
    path.write_text("".join(f"CHAPTER {n}\n\n{sentences(n)}\n" for n in range(4)), encoding="utf-8")


def records(path: Path) -> None:
    draw = random.Random(0)
    strands = ["".join(draw.choices("ACGT", k=60 * lines + 17)) for lines in (3, 12, 7, 5)]
    lines = ["\n".join(strand[i : i + 60] for i in range(0, len(strand), 60)) for strand in strands]
    path.write_text("".join(f">record {n} of four\n{strand}\n" for n, strand in enumerate(lines)))


def json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"id": n, "body": sentences(n)}) + "\n" for n in range(4)))


def compressed(path: Path) -> None:
    path.write_bytes(zstandard.compress(sentences(0).encode() * 3))


KINDS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...], str]] = {
    "book": ("book.txt", book, (), "bytes as one sequence"),
    "FASTA of several records": ("genes.fa", records, ("--format", "fasta"), "1,688 bytes in 4 sequences"),
    "JSON lines": ("lines.jsonl", json_lines, ("--field", "body"), "bytes in 4 sequences"),
    "zstd": ("text.txt.zst", compressed, (), f"{3 * len(sentences(0)):,} bytes as one sequence"),
}


def bits_per_byte(said: str) -> float:
    return float(said.partition(" bits per byte")[0])


def kill_after_some_steps(run: Path, *arguments: object) -> None:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= KILLED_AFTER):
        time.sleep(0.01)
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_text_goes_all_the_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMGRAD_DATA", str(tmp_path / "cache"))
    name, write, reading, said = KINDS[kind]
    text, killed, whole, tuned = (tmp_path / one for one in (name, "killed", "whole", "tuned"))
    write(text)

    kill_after_some_steps(killed, "train", text, *reading, *NUMBERS, "--out", killed)
    assert KILLED_AFTER <= len(rows(killed)) < STEPS
    succeed("train", "--resume", killed)
    succeed("train", text, *reading, *NUMBERS, "--out", whole)
    assert measured(killed) == measured(whole)
    last = [sorted((run / "snapshots").glob("step-*"))[-1] / "model.safetensors" for run in (killed, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert measured(killed)[-1]["validation_bits"] < 8

    found = succeed("eval", killed, text).stdout
    assert said in found
    prompt = ("--prompt", "ACGT") if reading == ("--format", "fasta") else ("--prompt", "The fox ")
    assert succeed("generate", killed, *prompt, "--tokens", 5).stdout.startswith(prompt[1])

    numbers = ("--steps", STEPS, "--set", "save_every=2")
    kill_after_some_steps(tuned, "finetune", killed, text, *numbers, "--out", tuned)
    succeed("train", "--resume", tuned)
    assert [row["step"] for row in rows(tuned)] == list(range(1, STEPS + 1))
    assert all(config(tuned)[one] == config(killed)[one] for one in ("format", "field"))
    assert bits_per_byte(succeed("eval", tuned, text).stdout) < bits_per_byte(found)
