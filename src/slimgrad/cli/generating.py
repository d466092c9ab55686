"""`slimgrad generate`: text from a trained model, written as it is drawn."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

from slimgrad.bytelm import open_model, pick_device, stream
from slimgrad.cli.screen import output_is_gone
from slimgrad.cli.words import printable
from slimgrad.data import Documents, open_file
from slimgrad.data.reading import read_documents
from slimgrad.errors import InputError

STDIN = "-"


def run_generation(
    run: Path,
    *,
    prompt: str | None,
    prompt_file: Path | None,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
) -> None:
    """Write the prompt and what follows it: bytes as they are into a file or pipe, printable text on a terminal."""
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file: expected one of them")
    if tokens < 0:
        raise InputError(f"--tokens {tokens}: expected zero or more")
    text = "\n" if prompt is None else prompt
    start = _read(prompt_file) if prompt_file is not None else text.encode(errors="surrogateescape")
    model, _ = open_model(run)
    model.to(pick_device(device))
    drawn = stream(model, start, tokens, temperature=temperature, top_p=top_p, seed=seed)
    try:
        _write(start, drawn)
    except OSError as error:
        raise output_is_gone(error) from error


def _write(start: bytes, drawn: Iterator[int]) -> None:
    if sys.stdout.isatty():
        for text in decoded(drawn, start):
            sys.stdout.write(printable(text))
            sys.stdout.flush()
        print()
        return
    sys.stdout.buffer.write(start)
    for byte in drawn:
        sys.stdout.buffer.write(bytes([byte]))
        sys.stdout.buffer.flush()


def decoded(drawn: Iterator[int], start: bytes) -> Iterator[str]:
    """UTF-8 as soon as a character is whole; what is none becomes a replacement mark."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield decoder.decode(start)
    for byte in drawn:
        yield decoder.decode(bytes([byte]))
    yield decoder.decode(b"", final=True)


def _read(path: Path) -> bytes:
    """A file's bytes, decompressed where it is compressed; those of a pipe, or of standard input, as they are."""
    try:
        if path == Path(STDIN) and not path.exists():
            return sys.stdin.buffer.read()
        if path.exists() and not path.is_file() and not path.is_dir():
            return path.read_bytes()
        text = Documents(read_documents(open_file(path).path)) if path.stat().st_size else None
    except OSError as error:
        raise InputError(f"--prompt-file {path}: expected a readable file, got: {error.strerror}") from error
    return b"" if text is None else text.read(0, len(text)).numpy().tobytes()
