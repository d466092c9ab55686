"""`slimgrad eval`: bits per byte of a file as one sequence, as it streams by."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from slimgrad.budget.process import peak_resident_bytes
from slimgrad.bytelm import CHUNKS_IN_A_PIECE, Evaluated, evaluate_stream, open_model, pick_device, read_pieces
from slimgrad.bytelm.config import TrainConfig
from slimgrad.bytelm.folder import describe_step
from slimgrad.bytelm.planned import PIECE_BYTES, plan_evaluation
from slimgrad.cli.budgeted import keep_within, peak_in_words
from slimgrad.cli.words import megabytes
from slimgrad.data import Documents, Reading, load_corpus
from slimgrad.errors import InputError

STDIN = "-"
CHUNK = 1024  # without a budget


def run_evaluation(
    run: Path,
    source: str,
    *,
    chunk: int | None = None,
    memory: str | None = None,
    device: str = "auto",
    format: str | None = None,
    field: str | None = None,
    fold_case: bool | None = None,
) -> None:
    """Print bits per byte; progress goes to standard error where that is a terminal, and then makes room.

    A file is read as the run read its corpus, where nothing else is said.
    """
    if chunk is not None and chunk < 1:
        raise InputError(f"--chunk {chunk}: expected at least 1")
    if chunk is not None and memory is not None:
        raise InputError("--chunk and --memory: expected one of them. --memory chooses the chunk")
    keep_within(memory, device, trains=False)
    model, config = open_model(run)
    text = _text(source, _reading(config, format, field, fold_case))
    model.to(pick_device(device))
    plan, piece = None, (chunk or CHUNK) * CHUNKS_IN_A_PIECE
    if memory is not None:
        plan = plan_evaluation(model, memory, None if text is None else len(text))
        chunk, piece = plan.chunk, plan.chunk * max(1, PIECE_BYTES // plan.chunk)
    chunk = chunk or CHUNK
    sequences = _streams(source, piece) if text is None else _documents(source, text, piece)
    began = time.perf_counter()
    found = Evaluated()
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"))
    console = Console(stderr=True, highlight=False)
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _naming(source), shown as progress:
        task = progress.add_task("starting", total=None if text is None else len(text))

        so_far = Evaluated()

        def report(of_this: Evaluated) -> None:
            nonlocal so_far
            so_far, both = of_this, found + of_this
            if both.predicted:
                speed = both.num_bytes / (time.perf_counter() - began)
                words = f"{both.bits_per_byte:.4f} bits/byte  {speed:,.0f} bytes/s"
                progress.update(task, completed=both.num_bytes, description=words)

        count, ended = 0, True
        try:
            for pieces in sequences:
                whole = evaluate_stream(model, pieces, chunk=chunk, report=report)
                found, count, so_far = found + whole, count + 1, Evaluated()
        except KeyboardInterrupt:
            found, count, ended = found + so_far, count + 1, False
            if not found.predicted:
                raise
    seconds = time.perf_counter() - began
    as_what = "as one sequence" if count == 1 else f"in {count} sequences, each from nothing"
    as_what += "" if ended else ", interrupted"
    print(f"{found.bits_per_byte:.4f} bits per byte: {source}, {found.num_bytes:,} bytes {as_what}")
    print(
        f"{found.predicted:,} bytes predicted in {seconds:,.0f} s ({found.num_bytes / seconds:,.0f} bytes/s), "
        + (f"at most {megabytes(peak_resident_bytes())} resident" if memory is None else f"chunks of {chunk:,}")
    )
    if memory is not None:
        print(peak_in_words(memory, plan))
    if step := describe_step(run, config):
        print(step)
    if not ended:
        raise KeyboardInterrupt


def _reading(config: TrainConfig | None, format: str | None, field: str | None, fold_case: bool | None) -> Reading:
    """As the run read its corpus, but for what is said now."""
    of_run = Reading() if config is None else config.reading
    if format is None:
        format = "jsonl" if field is not None else of_run.format
    folds = of_run.fold_case and format == "fasta" if fold_case is None else fold_case
    made: Any = Reading
    return made(format=format, field=field or of_run.field, fold_case=folds)


def _text(source: str, reading: Reading) -> Documents | None:
    """A file's or a folder's documents; None for standard input and other pipes, which are read as they come."""
    path = Path(source)
    if source == STDIN or (path.exists() and not path.is_file() and not path.is_dir()):
        if reading.format != "bytes":
            raise InputError(
                f"{source}: expected a file to read as {reading.format}, as the run or --format says; a pipe is taken "
                "as bytes. Write it to a file, or say --format bytes"
            )
        return None
    if not path.exists():
        raise InputError(f"{path}: expected a file, found nothing of that name. Check the path")
    return load_corpus(path, reading=reading).text


def _streams(source: str, piece_bytes: int) -> Iterator[Iterable[Tensor]]:
    """Standard input or a pipe, as one sequence."""
    if source == STDIN:
        yield read_pieces(sys.stdin.buffer, piece_bytes)
        return
    with Path(source).open("rb") as file:
        yield read_pieces(file, piece_bytes)


def _documents(source: str, text: Documents, piece_bytes: int) -> Iterator[Iterable[Tensor]]:
    """Each document as a sequence, piece by piece; those of one byte have nothing to predict."""
    spans = [(start, stop) for start, stop in text.spans if stop - start > 1]
    if not spans:
        raise InputError(f"{source}: expected a document of at least two bytes, one to read and one to predict")
    return (text.pieces(*span, piece_bytes) for span in spans)


@contextmanager
def _naming(source: str) -> Generator[None]:
    """Have every error say which text it is about: what the system refuses to read, and one that is too short."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{source}: expected a readable file, got: {error.strerror}. Check its rights") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
