"""The command line as a whole: its help, its version, and `slimgrad verify`."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import typer

import slimgrad
from slimgrad.bytelm import TrainConfig
from slimgrad.bytelm.config import describe
from slimgrad.bytelm.presets import PRESETS
from slimgrad.cli import main
from slimgrad.cli.app import app
from slimgrad.models import Performer, PerformerConfig
from tests.cli.running import run, succeed

COMMANDS = ("train", "finetune", "eval", "generate", "verify", "plan", "reproduce")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = succeed(command, "--help")
    assert "Usage: " in result.stdout
    assert command in result.stdout
    assert result.stderr == ""


HELP = """
import sys
from slimgrad.cli import main
from slimgrad.cli.app import app
for line in (["--help"], *([command, "--help"] for command in sys.argv[1:]), ["trian"], ["train", "--no-such"]):
    try:
        app(line)
    except SystemExit as ended:
        print("status", ended.code)
print("torch" in sys.modules)
"""


def test_help_and_wrong_command_lines_do_not_wait_for_torch() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", HELP, *COMMANDS], capture_output=True, text=True, check=True
    )
    *lines, last = found.stdout.splitlines()
    assert [line for line in lines if line.startswith("status")] == ["status 0"] * 8 + ["status 2"] * 2
    assert "No such command" in found.stderr
    assert last == "False"


def test_numbers_of_a_run_are_explained_by_the_configuration_itself() -> None:
    options = {option.name: option for option in typer.main.get_command(app).commands["train"].params}
    fields = [field.name for field in dataclasses.fields(TrainConfig) if field.name in options]
    assert len(fields) == 21
    for name in fields:
        assert options[name].help == describe(name) != ""
        assert options[name].opts == [f"--{name.replace('_', '-')}"]


def test_the_help_lists_presets_names_and_defaults() -> None:
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", succeed("train", "--help").stdout).split())
    assert f"numbers that suit it: {', '.join(PRESETS)}. [default: (modern)]" in shown
    assert "--steps <int> Optimiser steps. [default: (the preset's, of modern 1600)]" in shown
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"model", "parts"}
    names |= {f"model.{field.name}" for field in dataclasses.fields(PerformerConfig)}
    missing = [name for name in names if f"--{name.replace('_', '-')}" not in shown and f" {name}" not in shown]
    assert not missing


def test_the_help_lists_every_command() -> None:
    shown = succeed("--help").stdout
    for command in COMMANDS:
        assert command in shown


def test_an_interrupt_before_a_command_has_begun_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimgrad.cli.require_extra", interrupted)  # while others' packages are imported
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "slimgrad: interrupted\n"


def test_the_version_is_the_library_s() -> None:
    assert succeed("--version").stdout == f"slimgrad {slimgrad.__version__}\n"


@pytest.fixture
def _small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PerformerConfig(layers=2, width=16, heads=2)
    monkeypatch.setitem(PRESETS, "modern", TrainConfig(model=model, length=64, learning_rate=1e-2, chunk=16, steps=300))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.usefixtures("_small_preset")
def test_verify_reports_exactness(dtype: str) -> None:
    result = succeed("verify", "modern", "--length", 50, "--chunk", 12, "--dtype", dtype)
    assert result.stdout.startswith("preset modern: exact: Performer, chunks of 12 in 50 tokens, " + dtype)


@pytest.mark.usefixtures("_small_preset")
def test_verify_fails_where_a_gradient_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Performer._begin

    def forgets_its_position(self: Performer, inputs: object, state: dict[str, object]) -> object:
        return whole(self, inputs, {**state, "position": self.initial_state(1)["position"]})  # type: ignore[arg-type]

    monkeypatch.setattr(Performer, "_begin", forgets_its_position)
    result = run("verify", "modern", "--length", 50, "--chunk", 12)
    assert result.exit_code == 1, result.output
