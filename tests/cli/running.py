"""How the tests call the command line, and a run that takes a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from slimgrad.cli.app import app

FOX = b"the quick brown fox jumps over the lazy dog. " * 40
SHAPE = ("--set", "model.layers=1", "--set", "model.width=16", "--set", "model.heads=2")
LENGTH = 64
SIZE = ("--length", LENGTH, "--chunk", 16, "--set", "first_length=0")
TINY = (*SHAPE, *SIZE, "--steps", 6, "--save-every", 2, "--learning-rate", 0.01)
INPUT, FAILED = 2, 1


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": "100"})


def succeed(*arguments: object, stdin: bytes | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, (arguments, result.output)
    return result


def refuse(status: int, *arguments: object, stdin: bytes | None = None) -> str:
    """The one message of a command that cannot do what it was asked."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == status, (arguments, result.output)
    assert result.stderr.startswith("slimgrad: "), (arguments, result.stderr)
    assert len(result.stderr.splitlines()) == 1, (arguments, result.stderr)
    assert "Traceback" not in result.output
    return result.stderr


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(folder: Path) -> list[dict[str, Any]]:
    """The rows, without what a clock or the system tells."""
    told = {"seconds", "bytes_per_second", "resident_bytes"}
    return [{name: value for name, value in row.items() if name not in told} for row in rows(folder)]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["config"]


def snapshots(folder: Path) -> list[Path]:
    return sorted((folder / "snapshots").glob("step-*"))


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
