"""`slimgrad train`: what it leaves behind, how it goes on, and one clear message where it cannot."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimgrad import errors
from slimgrad.models import PRESETS
from slimgrad.train import read_snapshot, snapshot
from slimgrad.train.folder import read_rows
from tests.cli.command import refused, run
from tests.train.settings import TEXT, timeless
from tests.train.test_snapshot import flip

KNOWN = "I, II, III, IV, copying, ptb, enwik8, modern"


def test_training_leaves_everything_in_a_new_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    result = run("train", text, "--out", out)
    assert result.exit_code == 0, result.output
    names = {".lock", "config.json", "metrics.jsonl", "snapshots", "curve.png", "sample.txt", "memory.json"}
    assert {path.name for path in out.iterdir()} == names
    rows = read_rows(out)
    assert [row.length for row in rows] == [64, 64, 64, 128, 128, 256]
    assert math.isfinite(rows[-1].validation_bits or math.nan)
    record = json.loads((out / "config.json").read_text())
    assert record["config"]["steps"] == 6
    assert record["corpus"] | {"sha256": 0, "bytes": 0} == {
        "name": "fox", "given": str(text), "data_dir": None, "sha256": 0, "bytes": 0,
    }  # fmt: skip
    assert [session["after_step"] for session in record["sessions"]] == [0]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) > 600
    assert json.loads((out / "memory.json").read_text()).keys() == {"length", "slimgrad", "plain"}
    for word in ("chunk", "Rebuild()", "validation", "Sample", "plain backpropagation", "0:00:00 left", "run"):
        assert word in result.stdout


@pytest.mark.usefixtures("_unmeasured")
def test_without_a_corpus_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", "--steps", 1, "--length", 32, "--set", "validation_bytes=64")
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pydocs-")


def refusals(text: Path, finished: Path, tmp_path: Path) -> dict[tuple[object, ...], str]:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"too short")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    (tmp_path / "words").write_text("no model")
    return {
        (tmp_path / "absent",): "expected a file or folder, or one of pydocs, enwik8, ptb, tinyshakespeare, copying",
        (tmp_path / "hollow",): "expected a folder with files to read",
        (tmp_path / "empty",): "the file is empty",
        (tmp_path / "short",): "256 and 2 for validation), got 9",
        ("ptb", "--data-dir", tmp_path): "expected ptb.train.txt",
        (text, "--preset", "large"): f"unknown preset 'large': expected one of {KNOWN}",
        (text, "--chunk", 0): "chunk=0: expected at least 1",
        (text, "--length", 1): "length=1: expected at least 2",
        (text, "--steps", 0): "steps=0: expected at least 1",
        (text, "--seed", -1): "seed=-1: expected between 0",
        (text, "--batch", 0): "batch=0: expected at least 1",
        (text, "--method", "fast"): "method=fast: expected one of chunked, checkpoint, plain",
        (text, "--schedule", "often"): "schedule 'often': expected one of auto, rebuild, keep",
        (text, "--windows", "odd"): "windows=odd: expected one of shuffled, consecutive, random, documents",
        (text, "--windows", "documents", "--length", 64): "--length 64: expected none with --windows documents",
        (text, "--precision", "fp8"): "precision=fp8: expected one of float32, bf16",
        (text, "--device", "tpu"): "device=tpu: expected one of auto, cpu, cuda",
        (text, "--set", "speed=3"): "--set speed=3: expected NAME=VALUE with one of the names",
        (text, "--set", "warmup=long"): "configuration: warmup: Input should be a valid number",
        (text, "--out", text): "expected a new or empty folder, found a file",
        (text, "--out", text / "below"): "cannot be made",
        (text, "--out", tmp_path / "mine"): "found a folder that holds something",
        (text, "--out", finished): "found a run. Go on with it: slimgrad train --resume",
        (text, "--preset", "copying"): f"the copying task makes its own sequences: expected no corpus, got {text}",
        ("copying", "--preset", "copying", "--length", 33): "an even number of at least 4 for copying",
        (text, "--init", tmp_path / "absent"): "expected the folder of a run, found no such folder",
        (text, "--init", tmp_path / "words"): "expected a safetensors file, got",
        (
            text,
            "--init",
            finished,
            "--preset",
            "ptb",
        ): "holds a model of another shape: layers 2 instead of 3, width 16",
        (text, "--init", finished, "--set", "model.width=32"): "another shape: width 16 instead of 32",
        ("--resume", tmp_path / "absent"): "expected the folder of a run, found no such folder",
        ("--resume", tmp_path / "mine"): "found a folder without config.json",
        ("--resume", finished, "--steps", 9, "--set", "warmup=0"): "expected no --steps, no --set. Only how gradients",
        (tmp_path / "short", "--resume", finished): "expected the 1,800 bytes that the run began with, found 9 bytes",
    }


def test_bad_input_is_one_message_and_leaves_nothing_behind(
    text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = refusals(text, finished, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    kept = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for arguments, message in cases.items():
        refused(run("train", *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == kept


def test_without_the_extra_tensorboard_is_refused_before_any_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimgrad.cli.session.importlib.util.find_spec", lambda _: None)
    refused(run("train", text, "--tensorboard", "--out", tmp_path / "run"), "pip install 'slimgrad[tensorboard]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_unmeasured")
def test_tensorboard_holds_each_step_once_also_after_a_resume(text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert run("train", text, "--tensorboard", "--save-every", 2, "--out", out).exit_code == 0
    assert run("train", "--resume", out / "snapshots" / "step-00000004", "--tensorboard").exit_code == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    rows = read_rows(out)
    found = events.Scalars("training/bits_per_byte")
    assert [event.step for event in found] == [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in found] == pytest.approx([row.bits for row in rows])
    assert "validation/bits_per_byte" in events.Tags()["scalars"]


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "plain"],
        ["--method", "checkpoint"],
        ["--schedule", "binomial:2@disk"],
        ["--windows", "random", "--batch", 3, "--accumulate", 2, "--precision", "bf16"],
    ],
    ids=lambda options: options[1],
)
def test_every_way_to_train_runs(text: Path, tmp_path: Path, options: list[object], finished: Path) -> None:
    result = run("train", text, "--out", tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    bits = [row.bits for row in read_rows(tmp_path / "run")]
    assert len(bits) == 6
    if "--windows" not in options:  # the same run in another way
        assert bits == pytest.approx([row.bits for row in read_rows(finished)], rel=1e-5)


@pytest.mark.usefixtures("_unmeasured")
def test_a_folder_of_documents(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number, length in enumerate((300, 120, 77)):
        (folder / f"{number}.txt").write_bytes(bytes(TEXT[:length].tolist()))
    result = run("train", folder, "--windows", "documents", "--steps", 4, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "whole documents of up to 300 bytes" in result.stdout
    assert {row.length for row in read_rows(tmp_path / "run")} <= {300, 120, 77, 77 - 49}


@pytest.mark.usefixtures("_unmeasured")
def test_the_copying_task(tmp_path: Path) -> None:
    small = ["--set", "model.width=32", "--set", "model.heads=2", "--length", 32, "--steps", 3]
    result = run("train", "copying", "--preset", "copying", *small, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "copying: sequences of 32 symbols" in result.stdout
    assert not (tmp_path / "run" / "sample.txt").exists()
    assert run("train", "--resume", tmp_path / "run").exit_code == 0


@pytest.mark.usefixtures("_unmeasured")
def test_a_new_run_begins_with_any_model_of_the_shape(text: Path, finished: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model.safetensors"
    latest = finished / "snapshots" / "step-00000006"
    shutil.copy(latest / "model.safetensors", alone)
    firsts: list[float] = []
    for number, (source, more) in enumerate(
        {
            finished: [],
            latest: [],
            alone: ["--preset", "modern"],
            latest / "model.safetensors": ["--preset", "modern"],
        }.items()
    ):
        out = tmp_path / str(number)
        result = run("train", text, "--init", source, *more, "--steps", 2, "--out", out)
        assert result.exit_code == 0, result.output
        firsts.append(read_rows(out)[0].bits)
    assert len(set(firsts)) == 1
    assert firsts[0] < read_rows(finished)[0].bits
    refused(run("train", text, "--init", alone, "--out", tmp_path / "no"), "expected --preset beside it")


@pytest.mark.usefixtures("_unmeasured")
def test_a_finished_run_goes_on_to_the_same_end(finished: Path, mine: Path) -> None:
    (mine / "curve.png").unlink()
    result = run("train", "--resume", mine)
    assert result.exit_code == 0, result.output
    assert "resumed" in result.stdout
    for name in ("metrics.jsonl", "curve.png", "sample.txt"):
        assert (mine / name).read_bytes() == (finished / name).read_bytes()
    sessions = json.loads((mine / "config.json").read_text())["sessions"]
    assert [session["after_step"] for session in sessions] == [0, 6]


@pytest.mark.usefixtures("_unmeasured")
def test_an_earlier_snapshot_goes_on_to_the_same_end(finished: Path, mine: Path) -> None:
    result = run("train", "--resume", mine / "snapshots" / "step-00000004", "--method", "chunked")
    assert result.exit_code == 0, result.output
    assert timeless(read_rows(mine)) == timeless(read_rows(finished))
    model = "snapshots/step-00000006/model.safetensors"
    assert (mine / model).read_bytes() == (finished / model).read_bytes()


def test_a_damaged_snapshot_is_named_and_the_one_before_is_offered(mine: Path) -> None:
    flip(mine / "snapshots" / "step-00000006" / "optimizer.safetensors")
    result = run("train", "--resume", mine)
    refused(result, "step-00000006 is damaged: optimizer.safetensors: expected sha256")
    assert f"can be named instead of the run: {mine / 'snapshots' / 'step-00000004'}" in result.stderr
    for command in (["eval", mine, mine / "config.json"], ["generate", mine], ["finetune", mine, "pydocs"]):
        refused(run(*command), "step-00000006 is damaged")


@pytest.mark.usefixtures("_unmeasured")
def test_a_corpus_that_moved_can_be_named(mine: Path, text: Path, tmp_path: Path) -> None:
    record = json.loads((mine / "config.json").read_text())
    record["corpus"]["given"] = str(tmp_path / "gone.txt")
    (mine / "config.json").write_text(json.dumps(record))
    refused(run("train", "--resume", mine), "found nothing of that name")
    assert run("train", text, "--resume", mine).exit_code == 0


@pytest.mark.usefixtures("_unmeasured")
def test_other_software_or_another_processor_is_told(mine: Path) -> None:
    path = mine / "snapshots" / "step-00000006" / "snapshot.json"
    record = json.loads(path.read_text())
    record.pop("checksum")
    record["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(record | {"checksum": snapshot._checksum(record)}))
    result = run("train", "--resume", mine)
    assert result.exit_code == 0, result.output
    assert "bits may differ from an undisturbed run: torch 1.0 is now" in " ".join(result.stdout.split())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first_and_says_how_to_go_on(text: Path, tmp_path: Path, number: int, status: int) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
               "from slimgrad.cli import main; main()"]  # fmt: skip
    options = ["--steps", "5000", "--length", "256", "--set", "model.width=16", "--set", "validation_bytes=100"]
    process = subprocess.Popen(
        [*command, "train", str(text), *options, "--save-every", "1000000", "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and len(read_rows(out)) < 3:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == status, said
    step = len(read_rows(out))
    assert said.strip() == f"slimgrad: interrupted; saved after step {step:,}. Go on: slimgrad train --resume {out}"
    assert read_snapshot(out / "snapshots" / f"step-{step:08d}").step == step


@pytest.mark.usefixtures("_unmeasured")
def test_an_interrupt_after_the_training_ends_with_130(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimgrad.cli.session.generate", interrupt)
    result = run("train", text, "--out", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (130, "slimgrad: interrupted\n")
    assert len(read_rows(tmp_path / "run")) == 6


def test_no_space_stops_with_the_last_good_snapshot(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = snapshot.save_tensors, 0

    def full(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise OSError(28, "No space left on device")
        save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "save_tensors", full)
    result = run("train", text, "--save-every", 1, "--out", tmp_path / "run")
    refused(result, "step-00000003: expected to write it, got: No space left on device", status=1)
    good = tmp_path / "run" / "snapshots" / "step-00000002"
    assert f"The last good snapshot is {good}" in result.stderr
    assert read_snapshot(good).step == 2


@pytest.mark.parametrize("method", ["chunked", "plain"])
def test_a_run_that_diverges_says_at_which_step(text: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "run"
    result = run("train", text, "--learning-rate", 1e30, "--save-every", 1, "--method", method, "--out", out)
    refused(result, "Lower the learning rate", status=1)
    assert result.stderr.startswith("slimgrad: step ")
    assert f"The last good snapshot is {out / 'snapshots'}" in result.stderr
    assert run("generate", out, "--tokens", 1).exit_code == 0


def test_every_error_of_the_library_is_a_message() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, errors.SlimgradError) for kind in kinds)
    assert "modern" in PRESETS
