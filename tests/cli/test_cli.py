"""The command line as a whole: help, versions, exit statuses, and the report of exactness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import slimgrad
from slimgrad.models import Performer
from tests.cli.command import refused, run


@pytest.mark.parametrize("command", [[], ["train"], ["finetune"], ["eval"], ["generate"], ["verify"]])
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"slimgrad {slimgrad.__version__}\n")


def test_arguments_of_the_wrong_type_are_refused() -> None:
    for arguments in (["train", "--steps", "many"], ["verify"], ["eval"], ["generate"], ["finetune", "run"], ["teach"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_a_process_ends_with_the_status_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "train", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("slimgrad: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_verify_reports_exactness(dtype: str) -> None:
    result = run("verify", "modern", "--length", 50, "--chunk", 12, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("preset modern: exact: Performer, chunks of 12 in 50 tokens, " + dtype)


def test_verify_fails_where_a_gradient_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Performer._begin

    def forgets_its_position(self: Performer, inputs: object, state: dict[str, object]) -> object:
        return whole(self, inputs, {**state, "position": self.initial_state(1)["position"]})  # type: ignore[arg-type]

    monkeypatch.setattr(Performer, "_begin", forgets_its_position)
    result = run("verify", "modern", "--length", 50, "--chunk", 12)
    assert result.exit_code == 1, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["large"], "unknown preset 'large': expected one of I, II, III, IV, copying, ptb, enwik8, modern"),
        (["copying", "--chunk", 0], "--chunk 0: expected at least 1"),
        (["copying", "--length", 1], "--length 1: expected at least 2"),
        (["copying", "--dtype", "int8"], "--dtype int8: expected one of float64, float32, bfloat16"),
    ],
)
def test_verify_refuses_what_does_not_fit(arguments: list[object], message: str) -> None:
    refused(run("verify", *arguments), message)
