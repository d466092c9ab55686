"""Commands and their options. The work is in the modules beside this one, imported when a command runs.

Exit status: 0 all is well; 1 a run failed, or `verify` found a gradient that is not exact; 2 the input does not fit;
130 interrupted by Ctrl-C, 143 by SIGTERM, 129 by a terminal that was closed.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from slimgrad.bytelm.config import describe
from slimgrad.bytelm.presets import DEFAULT_PRESET, PRESETS
from slimgrad.cli.knobs import default_of, further_names, with_numbers
from slimgrad.cli.screen import CANNOT_WRITE, flush, output_is_gone
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


def _length(word: str) -> int | str:
    """An option's number of bytes, or "all"."""
    try:
        return word if word == "all" else int(word)
    except ValueError:
        raise typer.BadParameter(f"expected a number of bytes, or all, got {word!r}") from None


OF_TRAINING = (
    "format", "field", "fold_case", "validation", "chunk", "memory", "schedule", "method", "windows", "batch",
    "accumulate", "device", "precision", "optimizer", "learning_rate", "decay", "steps", "eval_every", "save_every",
    "seed",
)  # fmt: skip
Length = Annotated[
    Any,
    typer.Option(parser=_length, metavar="INTEGER|all", help=describe("length"), show_default=default_of("length")),
]
Numbers = Mapping[str, Any]  # options that `knobs` makes of the configuration's fields
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, one of its snapshots, or a model.safetensors.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help=f"Any other number of the run, as config.json names it: {', '.join(further_names(OF_TRAINING))}.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="A new folder for the results.", show_default="runs/CORPUS-DATE-TIME")]
Log = Annotated[str | None, typer.Option(help="Write every step for a dashboard: tensorboard or trackio.")]
DataDir = Annotated[Path | None, typer.Option(help="Where named corpora lie, instead of fetching them.")]


@contextmanager
def one_clear_message() -> Generator[None]:
    """Turn the library's own errors, what the system refuses, and an interrupt into a message and an exit status."""
    from slimgrad.sweep.allocation import is_allocation_failure

    try:
        yield
        flush()
    except SlimgradError as error:
        raise _end(2 if isinstance(error, InputError) else 1, str(error)) from error
    except OSError as error:
        if error.filename is not None:
            words = f"{error.filename}: expected to use it, got: {error.strerror}. Check the path and its rights"
            raise _end(2, words) from error
        if error.errno in CANNOT_WRITE:  # what is written elsewhere says of itself
            raise _end(1, str(output_is_gone(error))) from error
        raise
    except (MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        if is_allocation_failure(error):
            raise _end(1, f"memory ran out: {words}") from error
        if words == "can't start new thread":
            raise _end(1, f"{words}: memory or processes are limited to less than a run takes (ulimit)") from error
        raise
    except KeyboardInterrupt as error:
        raise _end(128 + getattr(error, "signal_number", 2), f"interrupted{_how_to_go_on(error)}") from error


def _end(status: int, words: str) -> typer.Exit:
    print(f"slimgrad: {words}", file=sys.stderr)
    return typer.Exit(status)


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
@with_numbers(dict.fromkeys(OF_TRAINING))
def train(
    corpus: Annotated[
        str | None,
        typer.Argument(
            help="A file, a folder of documents, enwik8, ptb, tinyshakespeare, or copying. Without one: Python's own "
            "documentation."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"The model's shape, and numbers that suit it: {', '.join(PRESETS)}.", show_default=DEFAULT_PRESET
        ),
    ] = None,
    length: Length = None,
    numbers: Numbers = MappingProxyType({}),
    settings: Settings = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A YAML file with any of the numbers, named as in config.json; options win over it."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Begin with the model of this run or file, however it was trained.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run (or from this snapshot of it), bit for bit.")
    ] = None,
    out: Out = None,
    data_dir: DataDir = None,
    log: Log = None,
    compare: Annotated[
        bool, typer.Option(help="At the end, measure one gradient beside plain backpropagation.")
    ] = True,
) -> None:
    """Train a Performer on text, then show the loss curve, a sample, and what memory one gradient takes.

    Ctrl-C, SIGTERM and a closed terminal save first. A run that ended in any way goes on with --resume.
    """
    with one_clear_message():
        from slimgrad.cli.options import Options
        from slimgrad.cli.resuming import resume_training
        from slimgrad.cli.training import run_training

        given = {**numbers, **({} if length is None else {"length": length})}
        options = Options(
            corpus=corpus, preset=preset, numbers=given, settings=tuple(settings or ()), init=init,
            resume=resume, out=out, data_dir=data_dir, log=log, compare=compare, config=config,
        )  # fmt: skip
        (run_training if resume is None else resume_training)(options)


@app.command()
def finetune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A Hugging Face model: its folder, or a name to fetch. Or a run of slimgrad, one of its snapshots, or "
            "its model.safetensors."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(
            help="What to adapt to: a text file (one document), a folder of them, JSONL with a field text or messages, "
            "or a tokenised dataset. For a run: a file, a folder, or a corpus' name."
        ),
    ] = None,
    lora: Annotated[int | None, typer.Option(help="The rank of adapters. Without: every weight is trained.")] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(help="Their scale, times the rank.", show_default="2 x rank")
    ] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Before the adapters.", show_default="0")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Weight-decomposed adapters.")] = False,
    bits: Annotated[int | None, typer.Option(help="4: frozen weights in four bits (QLoRA).")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens whose graph lives at once: what decides the memory.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Where keys and values are: device or host.", show_default="device")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="States to keep, as for train.", show_default="auto")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="transformers' own, inside each chunk.")
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The highest.", show_default="2e-4 for adapters, 2e-5 for every weight; of a run, a tenth"),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through the documents.", show_default="1")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead; for a run 20.")] = None,
    batch: Annotated[int | None, typer.Option(help="Documents at once, padded.", show_default="1")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches that make one step.", show_default="1")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of steps with a rising rate.", show_default="0.1")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.", show_default="as the model is saved")
    ] = None,
    eval_file: Annotated[str | None, typer.Option("--eval", help="Documents to evaluate on, before and after.")] = None,
    eval_share: Annotated[float | None, typer.Option(help="Or that share of the documents, e.g. 0.05.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", show_default="ten in all")
    ] = None,
    log: Log = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides adapters and order.", show_default="0, or the run's")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.", show_default="auto")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run from its last checkpoint; MODEL and DATA may be left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the results.", show_default="runs/NAME-DATE-TIME")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What this process may hold, as 2GiB or 500MB: chunk and schedule are then chosen."),
    ] = None,
    length: Annotated[
        Any,
        typer.Option(
            parser=_length, metavar="INTEGER|all", help="Of a run: bytes of one training sequence; all: the whole text."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Of a run: chunked, checkpoint or plain.")] = None,
    settings: Settings = None,
    data_dir: DataDir = None,
) -> None:
    """Adapt a Hugging Face model, or a run of slimgrad, to whole documents. The result is a folder of its own.

    Ctrl-C and SIGTERM save after the step (a second one stops at once).

    A Hugging Face model's run goes on with --resume here, one of slimgrad with slimgrad train --resume.
    """
    with one_clear_message():
        from slimgrad.cli.finetuning import run_finetune

        run_finetune(
            model, data, resume=resume, out=out, lora=lora, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            dora=dora or None, bits=bits, chunk=chunk, rows=rows, schedule=schedule,
            gradient_checkpointing=gradient_checkpointing or None, learning_rate=learning_rate, epochs=epochs,
            steps=steps, batch=batch, accumulate=accumulate, warmup=warmup, dtype=dtype, eval=eval_file,
            eval_share=eval_share, save_every=save_every, log=log, seed=seed, device=device, memory=memory,
            length=length, method=method, settings=settings or None, data_dir=data_dir,
        )  # fmt: skip


@app.command(name="eval")
@with_numbers({"format": "the run's", "field": "the run's", "fold_case": "the run's", "device": None})
def evaluate(
    run: RunArgument,
    file: Annotated[str, typer.Argument(help="The text: a file of any size, a folder, a pipe, or - (standard input).")],
    chunk: Annotated[
        int | None, typer.Option(help="Bytes that go through the model at once.", show_default="1024")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="In its place, what the process may hold, as 2GiB or 500MB.")
    ] = None,
    numbers: Numbers = MappingProxyType({}),
) -> None:
    """Bits per byte over a file as one sequence, streamed: memory does not depend on its size."""
    with one_clear_message():
        from slimgrad.cli.evaluating import run_evaluation

        run_evaluation(run, file, chunk=chunk, memory=memory, **numbers)


@app.command()
@with_numbers({"device": None})
def generate(
    run: RunArgument,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.", show_default="a new line")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file to go on from, in place of --prompt; - for standard input.")
    ] = None,
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
    model: Annotated[
        str,
        typer.Argument(
            help="A preset, or the shape of a run, untrained; or a Hugging Face model: its folder, or a name to fetch."
        ),
    ],
    length: Annotated[
        int | None, typer.Option(help="Of a preset: tokens that plain backpropagation must hold.", show_default="200")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Of a preset: tokens per chunk.", show_default="48")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a preset: float64, float32 or bfloat16.", show_default="float64")
    ] = None,
) -> None:
    """Compare chunked gradients with plain backpropagation: of a preset, a run's shape, or a Hugging Face model."""
    with one_clear_message():
        from slimgrad.cli.checking import run_verification

        if not run_verification(model, length=length, chunk=chunk, dtype=dtype):
            raise typer.Exit(1)


@app.command()
@with_numbers(dict.fromkeys(("schedule", "device")))
def plan(
    model: Annotated[str, typer.Argument(metavar="PRESET|RUN", help="A preset, or what was trained: a run's folder.")],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence.", min=2, show_default="the preset's or the run's")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What the process may hold, as 2GiB or 500MB.", show_default="nine tenths of what is free"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences side by side.", min=1, show_default="the preset's or the run's")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Show what chunks of so many tokens would take beside it.")] = None,
    numbers: Numbers = MappingProxyType({}),
    out: Annotated[Path | None, typer.Option(help="A PNG file for the picture.")] = None,
) -> None:
    """What a budget buys: chunk, schedule, time and every byte of the account, beside other chunks and methods."""
    with one_clear_message():
        from slimgrad.cli.planning import run_planning

        run_planning(model, memory=memory, length=length, batch=batch, chunk=chunk, out=out, **numbers)


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
        typer.Option(
            help="For rows and report; one begun before goes on.",
            show_default="runs/reproduce, or runs/reproduce-quick",
        ),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """The paper's experiments and more, point by point, with a report. The same command again goes on."""
    with one_clear_message():
        from slimgrad.cli.reproducing import run_programme

        run_programme(only=only or [], scale=scale, quick=quick, out=out, data_dir=data_dir)
