"""Running the command line in a test."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from slimgrad.cli import app
from slimgrad.models import Preset
from tests.train.settings import TINY_MODEL

TINY = Preset(model=TINY_MODEL, length=256, learning_rate=1e-2, chunk=64, steps=6, first_length=64)


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, input=stdin, env={"COLUMNS": "100"})


def refused(result: Result, message: str, status: int = 2) -> None:
    """One line that begins with the program's name, nothing before it, the exit status."""
    assert result.exit_code == status, result.output
    assert message in result.stderr, result.stderr
    assert result.stderr.startswith("slimgrad: ")
    assert len(result.stderr.splitlines()) == 1
    if status == 2:
        assert result.stdout == ""
