"""What cannot be done is one message on standard error, a status, no traceback, and nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimgrad.bytelm.presets import PRESETS
from tests.cli.running import FOX, LENGTH, SHAPE, SIZE, TINY, damage, everything, refuse, run, snapshots


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


def refuse_and_leave_nothing(*arguments: object, stdin: bytes | None = None) -> str:
    message = refuse(2, *arguments, stdin=stdin)
    assert list(Path().iterdir()) == [], arguments
    return message


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty"
    path.touch()
    return path


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short"
    path.write_bytes(b"too short")
    return path


def test_a_missing_text_is_refused_by_every_command(trained: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for command in (("train",), ("finetune", trained), ("eval", trained), ("train", "--init", trained)):
        assert f"{absent}: expected a file" in refuse_and_leave_nothing(*command, absent)
    assert "found nothing of that name" in refuse_and_leave_nothing("train", "")
    assert "--prompt-file" in refuse_and_leave_nothing("generate", trained, "--prompt-file", absent)


def test_an_empty_text_is_refused_by_every_command(trained: Path, empty: Path, tmp_path: Path) -> None:
    for command in (("train",), ("finetune", trained), ("train", "--init", trained)):
        assert "the file is empty" in refuse_and_leave_nothing(*command, empty)
    assert f"{empty}: expected bytes to read" in refuse_and_leave_nothing("eval", trained, empty)
    assert "at least two bytes" in refuse_and_leave_nothing("eval", trained, "-", stdin=b"")
    assert "at least one byte" in refuse_and_leave_nothing("generate", trained, "--prompt-file", empty)
    assert "at least one byte" in refuse_and_leave_nothing("generate", trained, "--prompt", "")
    folder = tmp_path / "nothing"
    folder.mkdir()
    for command in (("train",), ("finetune", trained), ("eval", trained)):
        assert "expected a folder with files to read" in refuse_and_leave_nothing(*command, folder)


def test_a_text_shorter_than_one_window_is_refused(trained: Path, short: Path, tmp_path: Path) -> None:
    for command in (("train", *SHAPE, *SIZE), ("finetune", trained), ("train", "--init", trained)):
        message = refuse_and_leave_nothing(*command, short)
        assert f"one window of {LENGTH} and 2 for validation), got 9" in message
    one = tmp_path / "one"
    one.write_bytes(b"1")
    assert f"{one}: expected a document of at least two bytes" in refuse_and_leave_nothing("eval", trained, one)
    assert "at least two bytes" in refuse_and_leave_nothing("eval", trained, "-", stdin=b"1")


def test_an_evaluated_folder_without_a_document_of_two_bytes_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short documents"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(b"1")
    message = f"{folder}: expected a document of at least two bytes"
    assert message in refuse_and_leave_nothing("eval", trained, folder)


def test_a_text_that_the_system_refuses_to_read_is_refused(
    trained: Path, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("slimgrad.data.documents.FileBytes.read", refuses)
    message = f"{fox}: expected a readable file, got: {os.strerror(errno.EIO)}"
    assert message in refuse_and_leave_nothing("eval", trained, fox)


def test_an_unknown_preset_is_refused_with_the_known_ones(trained: Path, fox: Path) -> None:
    known = f"unknown preset 'large': expected one of {', '.join(PRESETS)}"
    for command in (
        ("train", fox, "--preset", "large"),
        ("train", fox, "--preset", "large", "--init", trained),
        ("verify", "large"),
    ):
        assert known in refuse_and_leave_nothing(*command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chunk", 0), "chunk=0: expected at least 1"),
        (("--chunk", -4), "chunk=-4: expected at least 1"),
        (("--length", 1), "length=1: expected at least 2"),
        (("--steps", 0), "steps=0: expected at least 1"),
        (("--seed", -1), "seed=-1: expected between 0"),
        (("--learning-rate", 0), "learning_rate=0.0: expected a positive number"),
        (("--learning-rate", "nan"), "learning_rate=nan: expected a positive number"),
        (("--method", "guessing"), "method=guessing: expected one of chunked, checkpoint, plain"),
        (("--device", "tpu"), "device=tpu: expected one of auto, cpu, cuda"),
        (("--set", "steps"), "--set steps: expected NAME=VALUE with one of the names task, format"),
        (("--set", "pace=1"), "--set pace=1: expected NAME=VALUE with one of the names task, format"),
        (("--set", "model=1"), "--set model=1: expected NAME=VALUE"),
        (("--set", "model.depth=1"), "--set model.depth=1: expected model.NAME=VALUE with one of the names"),
        (("--set", "=1"), "--set =1: expected NAME=VALUE"),
        (("--set", "steps=many"), "configuration: steps: "),
        (("--set", "steps=0"), "steps=0: expected at least 1"),
        (("--set", "betas=0.9"), "configuration: betas: "),
        (("--set", "model.width=15"), "width"),
        (("--set", "warmup=2"), "warmup=2.0: expected a fraction between 0 and 1"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_before_a_run_or_a_fine_tuning(
    options: tuple[object, ...], message: str, trained: Path, fox: Path
) -> None:
    assert message in refuse_and_leave_nothing("train", fox, *TINY, *options)
    assert message in refuse_and_leave_nothing("finetune", trained, fox, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 0), "batch=0: expected at least 1"),
        (("--accumulate", 0), "accumulate=0: expected at least 1"),
        (("--eval-every", 0), "eval_every=0: expected at least 1"),
        (("--save-every", 0), "save_every=0: expected at least 1"),
        (("--windows", "sliding"), "windows=sliding: expected one of shuffled, consecutive, random, documents"),
        (("--precision", "int8"), "precision=int8: expected one of float32, bf16"),
        (("--schedule", "sometimes"), "schedule 'sometimes': expected one of auto, rebuild, keep, every:K"),
        (("--schedule", "every:"), "schedule 'every:': expected one of"),
        (("--schedule", "every:0"), "0"),
        (("--windows", "documents"), f"--length {LENGTH}: expected none with --windows documents"),
    ],
)
def test_a_number_of_training_that_makes_no_sense_is_refused_before_a_run(
    options: tuple[object, ...], message: str, fox: Path
) -> None:
    assert message in refuse_and_leave_nothing("train", fox, *TINY, *options)


def test_a_chunk_that_makes_no_sense_is_refused_by_every_command(trained: Path, fox: Path) -> None:
    for chunk in (0, -1):
        for command in (("eval", trained, fox), ("verify", "copying")):
            assert f"--chunk {chunk}: expected at least 1" in refuse_and_leave_nothing(*command, "--chunk", chunk)


def test_the_copying_task_takes_no_text(fox: Path) -> None:
    assert "expected no corpus" in refuse_and_leave_nothing("train", fox, "--preset", "copying")
    assert "an even number" in refuse_and_leave_nothing("train", "copying", "--preset", "copying", "--length", 33)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_folder_that_holds_something_is_left_as_it_is(command: str, trained: Path, fox: Path, tmp_path: Path) -> None:
    begin = ("train", fox, *TINY) if command == "train" else ("finetune", trained, fox)
    before = everything(trained)
    assert f"found a run. Go on with it: slimgrad train --resume {trained}" in refuse_and_leave_nothing(
        *begin, "--out", trained
    )
    assert everything(trained) == before
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "todo").write_text("keep")
    assert "found a folder that holds something" in refuse_and_leave_nothing(*begin, "--out", notes)
    assert everything(notes) == {"todo": b"keep"}
    assert "found a file" in refuse_and_leave_nothing(*begin, "--out", fox)
    assert "cannot be made" in refuse_and_leave_nothing(*begin, "--out", fox / "below")
    assert fox.read_bytes() == FOX


def test_an_empty_folder_may_hold_a_run(fox: Path) -> None:
    Path("new").mkdir()
    assert run("train", fox, *TINY, "--steps", 1, "--out", "new").exit_code == 0


def commands_that_read(path: object, fox: Path) -> dict[str, tuple[object, ...]]:
    return {
        "resume": ("train", "--resume", path),
        "init": ("train", fox, "--init", path),
        "finetune": ("finetune", path, fox),
        "eval": ("eval", path, fox),
        "generate": ("generate", path),
    }


@pytest.mark.parametrize("name", ["resume", "init", "finetune", "eval", "generate"])
def test_what_is_no_run_is_refused(name: str, fox: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert "found no such folder" in refuse_and_leave_nothing(*commands_that_read(nothing, fox)[name])
    nothing.mkdir()
    assert "without config.json" in refuse_and_leave_nothing(*commands_that_read(nothing, fox)[name])
    assert list(nothing.iterdir()) == []
    gone = tmp_path / "run" / "snapshots" / "step-00000007"
    refuse_and_leave_nothing(*commands_that_read(gone, fox)[name])
    assert not gone.parent.parent.exists()
    refuse_and_leave_nothing(*commands_that_read(fox, fox)[name])


@pytest.mark.parametrize("name", ["resume", "init", "finetune", "eval", "generate"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "snapshot.json"])
def test_a_damaged_snapshot_is_refused_and_the_one_before_offered(name: str, file: str, mine: Path, fox: Path) -> None:
    before, latest = snapshots(mine)
    damage(latest / file)
    content = everything(mine)
    message = refuse_and_leave_nothing(*commands_that_read(mine, fox)[name])
    assert f"snapshot {latest} is damaged" in message
    assert f"can be named instead of the run: {before}" in message
    assert f"snapshot {latest} is damaged" in refuse_and_leave_nothing(*commands_that_read(latest, fox)[name])
    assert everything(mine) == content


@pytest.mark.parametrize("name", ["resume", "init", "finetune", "eval", "generate"])
def test_where_every_snapshot_is_damaged_the_message_says_so(name: str, mine: Path, fox: Path) -> None:
    for snapshot in snapshots(mine):
        (snapshot / "model.safetensors").unlink()
    assert "No other one is intact" in refuse_and_leave_nothing(*commands_that_read(mine, fox)[name])


@pytest.mark.parametrize("name", ["resume", "init", "finetune", "eval", "generate"])
def test_a_damaged_record_of_a_run_is_refused(name: str, mine: Path, fox: Path) -> None:
    for content in ("{", "[]", "{}", '{"config": {"steps": 3}}', '{"config": 3}'):
        (mine / "config.json").write_text(content)
        assert "config.json: expected the record of a run" in refuse_and_leave_nothing(
            *commands_that_read(mine, fox)[name]
        )


@pytest.mark.parametrize("name", ["init", "finetune", "eval", "generate"])
def test_a_file_that_is_no_model_is_refused(name: str, mine: Path, fox: Path) -> None:
    assert "expected a safetensors file" in refuse_and_leave_nothing(*commands_that_read(fox, fox)[name])
    optimizer = snapshots(mine)[-1] / "optimizer.safetensors"
    refuse_and_leave_nothing(*commands_that_read(optimizer, fox)[name])


def test_a_snapshot_of_another_shape_is_refused(trained: Path, mine: Path, fox: Path) -> None:
    for source in (trained, snapshots(trained)[-1]):
        message = refuse_and_leave_nothing("train", fox, "--init", source, "--set", "model.width=32")
        assert "another shape: width 16 instead of 32" in message
        message = refuse_and_leave_nothing("train", fox, "--init", source, "--preset", "modern")
        assert "another shape: layers 1 instead of 3, width 16 instead of 128" in message
        message = refuse_and_leave_nothing("finetune", source, fox, "--set", "model.layers=2")
        assert "another shape: layers 1 instead of 2" in message
    record = (mine / "config.json").read_text().replace('"width": 16', '"width": 32')
    (mine / "config.json").write_text(record)
    assert "another shape: width 16 instead of 32" in refuse_and_leave_nothing("train", "--resume", mine)


def test_a_gpu_that_is_not_there_is_refused_by_every_command(
    mine: Path, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(mine)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in (
        ("train", fox, *TINY),
        ("train", "--resume", mine),
        ("finetune", mine, fox),
        ("eval", mine, fox),
        ("generate", mine),
    ):
        assert "expected a GPU that torch can use" in refuse_and_leave_nothing(*command, "--device", "cuda")
    assert everything(mine) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), "temperature=-1.0: expected zero or more"),
        (("--temperature", "nan"), "temperature=nan: expected zero or more"),
        (("--temperature", "inf"), "temperature=inf: expected zero or more"),
        (("--top-p", 0), "top_p=0.0: expected more than 0"),
        (("--top-p", 1.5), "top_p=1.5: expected more than 0"),
        (("--tokens", -1), "-1: expected zero or more"),
        (("--seed", -1), "seed=-1: expected between 0"),
        (("--seed", 2**63), "expected between 0"),
        (("--device", "tpu"), "device 'tpu': expected one of auto, cpu, cuda"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_before_a_byte_is_generated(
    options: tuple[object, ...], message: str, trained: Path
) -> None:
    result = run("generate", trained, *options)
    assert result.stdout == ""
    assert message in refuse_and_leave_nothing("generate", trained, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--length", 1), "--length 1: expected at least 2"),
        (("--dtype", "int8"), "--dtype int8: expected one of float64, float32, bfloat16"),
    ],
)
def test_what_cannot_be_verified_is_refused(options: tuple[object, ...], message: str) -> None:
    assert message in refuse_and_leave_nothing("verify", "copying", *options)


def test_arguments_of_the_wrong_type_are_refused() -> None:
    for arguments in (["train", "--steps", "many"], ["verify"], ["eval"], ["generate"], ["finetune", "run"], ["teach"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_a_process_ends_with_the_status_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "train", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("slimgrad: ")
    assert len(done.stderr.splitlines()) == 1
