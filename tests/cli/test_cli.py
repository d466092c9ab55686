"""The command line: what it leaves behind, and one clear message with an exit status where it cannot go on."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import slimgrad
from slimgrad.cli import app
from slimgrad.models import PRESETS, Preset
from slimgrad.train import Cost
from tests.train.settings import TEXT, TINY_MODEL


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_bytes(bytes(TEXT.tolist()))
    return path


@pytest.fixture
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Preset(model=TINY_MODEL, length=256, learning_rate=1e-2, chunk=64, steps=6, first_length=64)
    monkeypatch.setitem(PRESETS, "modern", tiny)


@pytest.mark.parametrize("command", [[], ["train"], ["verify"]])
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"slimgrad {slimgrad.__version__}\n")


@pytest.mark.usefixtures("_tiny_preset")
def test_training_leaves_everything_in_a_new_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    result = run("train", text, "--out", out)
    assert result.exit_code == 0, result.output
    names = {"config.json", "metrics.csv", "curve.png", "sample.txt", "memory.json"}
    assert {path.name for path in out.iterdir()} == names
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [int(row["length"]) for row in rows] == [64, 64, 64, 128, 128, 256]
    assert math.isfinite(float(rows[-1]["validation_bits"]))
    assert json.loads((out / "config.json").read_text())["config"]["steps"] == 6
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) > 600
    assert json.loads((out / "memory.json").read_text()).keys() == {"slimgrad", "plain"}
    for word in ("chunk", "Rebuild()", "validation", "Sample", "plain backpropagation", "0:00:00 left", "run"):
        assert word in result.stdout


@pytest.mark.usefixtures("_tiny_preset")
def test_without_a_file_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slimgrad.cli.training.measure_gradient", lambda *_, **__: Cost(peak_bytes=None, seconds=1.0))
    monkeypatch.setattr("slimgrad.cli.training.validation_bytes", lambda _: 64)
    result = run("train", "--steps", 1, "--length", 32)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pydocs-")


@pytest.mark.usefixtures("_tiny_preset")
def test_what_someone_made_is_never_overwritten(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes").write_text("keep")
    result = run("train", text, "--out", out)
    assert result.exit_code == 2
    assert "expected a new or empty folder, found a folder that holds something" in result.stderr
    assert [path.read_text() for path in out.iterdir()] == ["keep"]


@pytest.mark.usefixtures("_tiny_preset")
def test_bad_input_is_one_message_on_stderr(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"too short")
    cases: dict[tuple[object, ...], str] = {
        ("train", tmp_path / "absent"): "expected a file, found nothing of that name",
        ("train", tmp_path): "expected a file, found a directory",
        ("train", tmp_path / "empty"): "the file is empty",
        ("train", tmp_path / "short"): "256 and 2 for validation), got 9",
        ("train", text, "--preset", "large"): f"unknown preset 'large': expected one of {', '.join(PRESETS)}",
        ("train", text, "--chunk", 0): "chunk=0: expected at least 1",
        ("train", text, "--length", 1): "length=1: expected at least 2",
        ("train", text, "--steps", 0): "steps=0: expected at least 1",
        ("train", text, "--seed", -1): "seed=-1: expected between 0",
        ("train", text, "--out", text): "expected a new or empty folder, found a file",
        ("train", text, "--out", text / "below"): "cannot be made",
        ("verify", "large"): "unknown preset 'large'",
        ("verify", "copying", "--chunk", 0): "--chunk 0: expected at least 1",
        ("verify", "copying", "--length", 1): "--length 1: expected at least 2",
        ("verify", "copying", "--dtype", "int8"): "--dtype int8: expected one of float64, float32, bfloat16",
    }
    for arguments, message in cases.items():
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.stderr.startswith("slimgrad: "), (arguments, result.stderr)
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""


def test_arguments_of_the_wrong_type_are_refused() -> None:
    for arguments in (["train", "--steps", "many"], ["verify"], ["teach"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_a_process_ends_with_the_status_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "train", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("slimgrad: ")
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("_tiny_preset")
def test_an_interrupt_ends_with_130_and_keeps_what_was_measured(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimgrad.cli.training.generate", interrupt)
    result = run("train", text, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr == "slimgrad: interrupted\n"
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 7


@pytest.mark.usefixtures("_tiny_preset")
def test_a_run_that_diverges_says_so(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging = Preset(model=TINY_MODEL, length=64, learning_rate=1e30, chunk=64, steps=6)
    monkeypatch.setitem(PRESETS, "modern", diverging)
    result = run("train", text, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.startswith("slimgrad: ")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.usefixtures("_tiny_preset")
def test_verify_reports_exactness(dtype: str) -> None:
    result = run("verify", "modern", "--length", 50, "--chunk", 12, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("preset modern: exact: Performer, chunks of 12 in 50 tokens, " + dtype)


@pytest.mark.usefixtures("_tiny_preset")
def test_verify_fails_where_a_gradient_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimgrad.models import Performer

    whole = Performer._begin

    def forgets_its_position(self: Performer, inputs: object, state: dict[str, object]) -> object:
        return whole(self, inputs, {**state, "position": self.initial_state(1)["position"]})  # type: ignore[arg-type]

    monkeypatch.setattr(Performer, "_begin", forgets_its_position)
    result = run("verify", "modern", "--length", 50, "--chunk", 12)
    assert result.exit_code == 1, result.output
