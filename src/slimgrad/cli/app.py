"""Commands and their options. The work is in the modules beside this one, imported when a command runs.

Exit status: 0 all is well; 1 a run failed, or `verify` found a gradient that is not exact; 2 the input does not fit;
130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from slimgrad.cli.knobs import with_numbers
from slimgrad.errors import InputError, SlimgradError

EXPERIMENTS = (
    "tradeoff",
    "precision",
    "copying",
    "ptb",
    "enwik8",
    "books",
    "finetuning",
    "horizon",
    "lengths",
    "schedules",
)

app = typer.Typer(
    name="slimgrad",
    help="Exact gradients of causal sequence models over sequences of any length, in the memory you state.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Numbers = Mapping[str, Any]  # options that `knobs` makes of the configuration's fields
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, one of its snapshots, or a model.safetensors.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other number of the run, as config.json names it."),
]
Out = Annotated[Path | None, typer.Option(help="A new folder for the results.", show_default="runs/CORPUS-DATE-TIME")]
DataDir = Annotated[Path | None, typer.Option(help="Where named corpora lie, instead of fetching them.")]


@contextmanager
def one_clear_message() -> Generator[None]:
    """Turn the library's own errors and an interrupt into a message and an exit status."""
    try:
        yield
    except SlimgradError as error:
        print(f"slimgrad: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except KeyboardInterrupt as error:
        number = getattr(error, "signal_number", 2)
        print(f"slimgrad: interrupted{_how_to_go_on(error)}", file=sys.stderr)
        raise typer.Exit(128 + number) from error


def _how_to_go_on(error: KeyboardInterrupt) -> str:
    return "".join(f"; {note}" for note in getattr(error, "__notes__", []))


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
@with_numbers(
    dict.fromkeys((
        "length", "chunk", "schedule", "method", "windows", "batch", "accumulate", "device", "precision",
        "learning_rate", "steps", "eval_every", "save_every", "seed",
    ))
)  # fmt: skip
def train(
    corpus: Annotated[
        str | None,
        typer.Argument(
            help="A file, a folder of documents, enwik8, ptb, tinyshakespeare, or copying. Without one: Python's own "
            "documentation."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The model's shape, and numbers that suit it.", show_default="modern")
    ] = None,
    numbers: Numbers = MappingProxyType({}),
    settings: Settings = None,
    init: Annotated[
        Path | None, typer.Option(help="Begin with the model of this run or file, however it was trained.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run (or from this snapshot of it), bit for bit.")
    ] = None,
    out: Out = None,
    data_dir: DataDir = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
) -> None:
    """Train a Performer on text, then show the loss curve, a sample, and what memory one gradient takes.

    Ctrl-C and SIGTERM save first. A run that ended in any way goes on with --resume.
    """
    with one_clear_message():
        from slimgrad.cli.training import Options, run_training

        run_training(
            Options(
                corpus=corpus, preset=preset, numbers=numbers, settings=tuple(settings or ()), init=init,
                resume=resume, out=out, data_dir=data_dir, tensorboard=tensorboard,
            )
        )  # fmt: skip


@app.command()
@with_numbers(
    dict.fromkeys(("length", "chunk", "method", "device"))
    | {"learning_rate": "a tenth of the run's", "steps": "20", "seed": "the run's"}
)
def finetune(
    run: RunArgument,
    file: Annotated[str, typer.Argument(help="The text to adapt to: a file, a folder, or a corpus' name.")],
    memory: Annotated[
        str | None, typer.Option(help="Most data this process may hold, e.g. 500MB; enforced by the kernel (Linux).")
    ] = None,
    numbers: Numbers = MappingProxyType({}),
    settings: Settings = None,
    out: Out = None,
    data_dir: DataDir = None,
) -> None:
    """Adapt a trained model to a text, within a hard limit on memory. The result is a run of its own."""
    with one_clear_message():
        from slimgrad.cli.training import Options, run_finetuning

        options = Options(corpus=file, numbers=numbers, settings=tuple(settings or ()), out=out, data_dir=data_dir)
        run_finetuning(options, run, memory)


@app.command(name="eval")
@with_numbers({"device": None})
def evaluate(
    run: RunArgument,
    file: Annotated[str, typer.Argument(help="The text: a file of any size, - for standard input, or a folder.")],
    chunk: Annotated[int, typer.Option(help="Bytes that go through the model at once.")] = 1024,
    numbers: Numbers = MappingProxyType({}),
) -> None:
    """Bits per byte over a file as one sequence, streamed: memory does not depend on its size."""
    with one_clear_message():
        from slimgrad.cli.evaluating import run_evaluation

        run_evaluation(run, file, chunk=chunk, device=numbers.get("device", "auto"))


@app.command()
@with_numbers({"device": None})
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "\n",
    prompt_file: Annotated[Path | None, typer.Option(help="A file to go on from, in place of --prompt.")] = None,
    tokens: Annotated[int, typer.Option(help="Bytes to generate.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte; 1 draws as the model says.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest bytes that have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    numbers: Numbers = MappingProxyType({}),
) -> None:
    """Text from a trained model, from its recurrent state: memory and time per byte do not grow."""
    with one_clear_message():
        from slimgrad.cli.generating import run_generation

        run_generation(
            run, prompt=prompt, prompt_file=prompt_file, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed,
            device=numbers.get("device", "auto"),
        )  # fmt: skip


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


@app.command()
def reproduce(
    only: Annotated[list[str] | None, typer.Option(help=f"These parts alone: {', '.join(EXPERIMENTS)}.")] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Share of the published steps, for every run; above 1: longer.", show_default="copying 1, others 0.05"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option(help="All of it in small, in minutes, on what Python carries.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="For rows and report; one begun before goes on.", show_default="runs/reproduce"),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """The paper's experiments and more, point by point, with a report. The same command again goes on."""
    with one_clear_message():
        from slimgrad.cli.reproducing import run_programme

        run_programme(only=only or [], scale=scale, quick=quick, out=out, data_dir=data_dir)
