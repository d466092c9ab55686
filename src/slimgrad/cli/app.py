"""Commands and their options. The work is in `training` and `checking`, imported when a command runs.

Exit status: 0 all is well; 1 a run failed, or `verify` found a gradient that is not exact; 2 the input does not fit;
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from slimgrad.errors import InputError, SlimgradError

app = typer.Typer(
    name="slimgrad",
    help="Exact gradients of causal sequence models over sequences of any length, in the memory you state.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@contextmanager
def one_clear_message() -> Generator[None]:
    """Turn the library's own errors and an interrupt into a message and an exit status."""
    try:
        yield
    except SlimgradError as error:
        print(f"slimgrad: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except KeyboardInterrupt as error:
        print("slimgrad: interrupted", file=sys.stderr)
        raise typer.Exit(130) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        from slimgrad import __version__

        print(f"slimgrad {__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exact gradients of causal sequence models over sequences of any length, in the memory you state."""


@app.command()
def train(
    file: Annotated[
        Path | None, typer.Argument(help="Any file: its bytes are the text. Without one: Python's own documentation.")
    ] = None,
    preset: Annotated[str, typer.Option(help="The model's shape, and numbers that suit it.")] = "modern",
    length: Annotated[int | None, typer.Option(help="Bytes of one training sequence.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Bytes whose graph lives at once: what decides the memory.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, one sequence each.")] = None,
    seed: Annotated[int, typer.Option(help="Decides parameters and order; the same seed gives the same run.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the results.", show_default="runs/CORPUS-DATE-TIME")
    ] = None,
) -> None:
    """Train a Performer on text, then show the loss curve, a sample, and what memory one gradient takes."""
    with one_clear_message():
        from slimgrad.cli.training import run_training

        run_training(file, preset, length=length, chunk=chunk, steps=steps, seed=seed, out=out)


@app.command()
def verify(
    preset: Annotated[str, typer.Argument(help="The model to check, untrained.")],
    length: Annotated[int, typer.Option(help="Tokens of the sequence, which plain backpropagation must hold.")] = 200,
    chunk: Annotated[int, typer.Option(help="Tokens per chunk.")] = 48,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float64",
) -> None:
    """Compare chunked gradients with plain backpropagation, parameter by parameter."""
    with one_clear_message():
        from slimgrad.cli.checking import run_verification

        if not run_verification(preset, length=length, chunk=chunk, dtype=dtype):
            raise typer.Exit(1)
