"""`slimgrad train`: say what will run and why, run it under a progress bar, show what came of it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import slimgrad
from slimgrad.cli.curve import save_picture, sketch, smooth
from slimgrad.cli.output import RunFolder
from slimgrad.data import Corpus, load_corpus, split_bytes
from slimgrad.models import get_preset
from slimgrad.train import (
    Cost,
    Row,
    TrainConfig,
    Trained,
    build_model,
    config_for,
    generate,
    measure_gradient,
    plan_schedule,
    train,
)

SAMPLE_BYTES = 600
PROMPT_BYTES = 64
TEMPERATURE = 0.7


def run_training(
    file: Path | None,
    preset: str,
    *,
    length: int | None,
    chunk: int | None,
    steps: int | None,
    seed: int,
    out: Path | None,
) -> None:
    """Train, and leave the results in a new folder."""
    began = time.perf_counter()
    console = Console(highlight=False)
    shape = get_preset(preset)
    corpus = load_corpus(file)
    config = config_for(
        shape, length=length, chunk=chunk, steps=steps, seed=seed, validation_bytes=validation_bytes(len(corpus.data))
    )
    split = split_bytes(corpus.data, validation=config.validation_bytes, window=config.length)
    with RunFolder(out, corpus.name) as folder:
        settings = _describe(config, corpus, preset)
        folder.write_json("config.json", {"settings": settings, "config": config.to_dict()})
        _print_settings(console, {**settings, "results": str(folder.path)})
        trained = _train_with_progress(console, config, corpus, folder)
        _show_curve(console, trained, folder, corpus)
        _show_sample(console, trained, folder, choose_prompt(bytes(split.validation.tolist())), seed)
        _show_memory(console, config, folder)
    console.print(f"\n{time.perf_counter() - began:.0f} s in all; everything is in [bold]{escape(str(folder.path))}[/]")


def validation_bytes(num_bytes: int) -> int:
    """A tenth of the corpus, at most 32,768 bytes."""
    return max(2, min(32_768, num_bytes // 10))


def _describe(config: TrainConfig, corpus: Corpus, preset: str) -> dict[str, str]:
    """The resolved run in words, with the reason for each choice."""
    model, shape = build_model(config), config.model
    parameters = sum(p.numel() for p in model.parameters())
    _, reason = plan_schedule(config, model)
    chunks = math.ceil(config.length / config.chunk)
    return {
        "corpus": f"{corpus.name}: {len(corpus.data):,} bytes from {corpus.source}, "
        f"the last {config.validation_bytes:,} for validation",
        "model": f"{preset}: {shape.layers} layers, width {shape.width}, {shape.heads} heads, "
        f"{parameters / 1e6:.2f} million parameters",
        "sequences": f"{config.steps:,} steps, {_growth(config)}{sum(config.step_lengths()) / 1e6:.1f} MB in all",
        "chunk": f"{config.chunk:,} bytes: only one chunk's graph lives at a time, of {chunks} in a sequence",
        "schedule": reason,
        "optimiser": f"AdamW, learning rate {config.learning_rate:g} after {config.warmup:.0%} warm-up, then a cosine",
        "software": f"slimgrad {slimgrad.__version__}, torch {torch.__version__}, {_threads()}, seed {config.seed}",
    }


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _growth(config: TrainConfig) -> str:
    first = config.step_lengths()[0]
    if first == config.length:
        return f"each of {config.length:,} bytes: "
    return f"the first of {first:,} bytes, doubling up to {config.length:,}: "


def _print_settings(console: Console, settings: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, words in settings.items():
        table.add_row(f"[bold]{name}[/]", escape(words))
    console.print(table)
    console.print()


def _train_with_progress(console: Console, config: TrainConfig, corpus: Corpus, folder: RunFolder) -> Trained:
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=sum(config.step_lengths()))
        recent: list[Row] = []

        def report(row: Row) -> None:
            folder.add(row)
            recent[:] = [*recent[-19:], row]
            bits = sum(r.bits for r in recent) / len(recent)
            speed = sum(r.length for r in recent) / sum(r.length / r.bytes_per_second for r in recent)
            words = f"{bits:.2f} bits/byte  {speed:,.0f} bytes/s  {megabytes(row.resident_bytes)}"
            progress.update(task, completed=row.bytes_seen, description=words)
            if row.validation_bits is not None:
                progress.console.print(
                    f"step {row.step:>6,}  training {bits:.3f}  validation [bold]{row.validation_bits:.3f}[/] bits/byte"
                )

        return train(config, corpus.data, report)


def _show_curve(console: Console, trained: Trained, folder: RunFolder, corpus: Corpus) -> None:
    save_picture(folder.path / "curve.png", trained.rows, f"{corpus.name}: loss while training")
    bits = smooth([row.bits for row in trained.rows], max(1, len(trained.rows) // 40))
    console.print("\n[bold]Training loss[/], bits per byte over the steps")
    for line in sketch(bits, unicode=(console.encoding or "").startswith("utf")):
        console.print(f"  {line}", markup=False)
    console.print(f"  validation after the last step: [bold]{trained.validation_bits:.3f}[/] bits per byte")


def choose_prompt(text: bytes) -> bytes:
    """`PROMPT_BYTES` bytes from the start of a line (or of the text): those with the most letters, which are prose."""
    starts = [0, *(i + 1 for i, byte in enumerate(text) if byte == ord("\n"))]
    pieces = [text[start : start + PROMPT_BYTES] for start in starts if start < len(text)]
    return max(pieces, key=lambda piece: sum(chr(byte).isalpha() for byte in piece if byte < 128))


def _show_sample(console: Console, trained: Trained, folder: RunFolder, prompt: bytes, seed: int) -> None:
    text = generate(trained.model, prompt, SAMPLE_BYTES, temperature=TEMPERATURE, seed=seed)
    folder.write_bytes("sample.txt", prompt + text)
    console.print(
        f"\n[bold]Sample[/], going on from [cyan]a prompt[/] of the validation text, temperature {TEMPERATURE}"
    )
    shown = f"[cyan]{escape(printable(prompt))}[/]{escape(printable(text))}"
    console.print(Padding(shown, (0, 0, 0, 2), expand=False))


def _show_memory(console: Console, config: TrainConfig, folder: RunFolder) -> None:
    console.print(f"\n[bold]One gradient[/] over {config.length:,} bytes, each way in a process of its own")
    ours = measure_gradient(config.model, length=config.length, chunk=config.chunk, method="slimgrad")
    plain = measure_gradient(config.model, length=config.length, chunk=config.chunk, method="plain")
    table = Table.grid(padding=(0, 3))
    for name, cost in ((f"slimgrad, chunks of {config.chunk:,}", ours), ("plain backpropagation", plain)):
        table.add_row(f"  {name}", f"[bold]{megabytes(cost.peak_bytes)}[/]", _seconds(cost))
    console.print(table)
    if ours.peak_bytes and plain.peak_bytes:
        console.print(f"  the same gradient in [bold]1/{plain.peak_bytes / ours.peak_bytes:.1f}[/] of the memory")
    folder.write_json("memory.json", {"slimgrad": vars(ours), "plain": vars(plain)})


def _seconds(cost: Cost) -> str:
    return cost.note or f"{cost.seconds:.1f} s"


def megabytes(num_bytes: int | None) -> str:
    """Bytes in words."""
    return "not measured" if num_bytes is None else f"{num_bytes / 1e6:,.0f} MB"


def printable(text: bytes) -> str:
    """Bytes as text that a terminal can show: what is not UTF-8, and control characters, become a replacement mark."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in decoded)
