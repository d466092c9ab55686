"""The command line: parse, call, print. Everything it does is one call of the library away."""

from __future__ import annotations

import io
import sys

from slimgrad.errors import MissingExtraError
from slimgrad.extras import require_extra

__all__ = ["main"]


def main() -> None:
    """The entry point `slimgrad`."""
    try:
        _run()
    except KeyboardInterrupt as error:  # before a command has begun
        print("slimgrad: interrupted", file=sys.stderr)
        raise SystemExit(130) from error


def _run() -> None:
    try:
        require_extra("train", "the command line")
    except MissingExtraError as error:
        print(f"slimgrad: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for stream in (sys.stdout, sys.stderr):  # an encoding that lacks a character costs that character alone
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from slimgrad.cli.app import app

    app()
