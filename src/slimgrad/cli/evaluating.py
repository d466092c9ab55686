"""`slimgrad eval`: bits per byte of a file as one sequence, as it streams by."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from slimgrad.budget.process import peak_resident_bytes
from slimgrad.bytelm import CHUNKS_IN_A_PIECE, Evaluated, evaluate_stream, open_model, pick_device, read_pieces
from slimgrad.bytelm.planned import PIECE_BYTES, plan_evaluation
from slimgrad.cli.budgeted import keep_within, peak_in_words
from slimgrad.cli.words import megabytes
from slimgrad.data import load_corpus
from slimgrad.data.looks import require_text
from slimgrad.errors import InputError

STDIN = "-"
CHUNK = 1024  # without a budget


def run_evaluation(run: Path, source: str, *, chunk: int | None, memory: str | None, device: str) -> None:
    """Print bits per byte; progress goes to standard error where that is a terminal, and then makes room."""
    if chunk is not None and chunk < 1:
        raise InputError(f"--chunk {chunk}: expected at least 1")
    if chunk is not None and memory is not None:
        raise InputError("--chunk and --memory: expected one of them. --memory chooses the chunk")
    keep_within(memory, device, trains=False)
    model, _ = open_model(run)
    model.to(pick_device(device))
    plan, piece = None, (chunk or CHUNK) * CHUNKS_IN_A_PIECE
    if memory is not None:
        plan = plan_evaluation(model, memory, _bytes_of(source))
        chunk, piece = plan.chunk, plan.chunk * max(1, PIECE_BYTES // plan.chunk)
    chunk = chunk or CHUNK
    sequences, total = _sequences(source, piece)
    began = time.perf_counter()
    found = Evaluated()
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"))
    console = Console(stderr=True, highlight=False)
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _naming(source), shown as progress:
        task = progress.add_task("starting", total=total)

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
    if not ended:
        raise KeyboardInterrupt


def _bytes_of(source: str) -> int | None:
    """Of one file, where that can be told."""
    path = Path(source)
    return path.stat().st_size if source != STDIN and path.is_file() else None


def _sequences(source: str, piece_bytes: int) -> tuple[Iterator[Iterable[Tensor]], int | None]:
    """One stream for a file or standard input, one for each document of a folder; and the bytes in all."""
    path = Path(source)
    if source == STDIN:
        return iter([read_pieces(sys.stdin.buffer, piece_bytes)]), None
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path}: expected a file, found nothing of that name. Check the path")
        require_text(path)
        return _one_file(path, piece_bytes), path.stat().st_size
    text = load_corpus(path).text
    spans = [(start, stop) for start, stop in text.spans if stop - start > 1]
    if not spans:
        raise InputError(f"{path}: expected a file of at least two bytes below it, one to read and one to predict")
    return (text.pieces(*span, piece_bytes) for span in spans), sum(stop - start for start, stop in spans)


def _one_file(path: Path, piece_bytes: int) -> Iterator[Iterable[Tensor]]:
    with path.open("rb", buffering=0) as file:
        yield read_pieces(cast(BinaryIO, file), piece_bytes)


@contextmanager
def _naming(source: str) -> Generator[None]:
    """Have every error say which text it is about: what the system refuses to read, and one that is too short."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{source}: expected a readable file, got: {error.strerror}. Check its rights") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
