"""The command line: parse, call, print. Everything it does is one call of the library away."""

from __future__ import annotations

from slimgrad.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The entry point `slimgrad`."""
    app()
