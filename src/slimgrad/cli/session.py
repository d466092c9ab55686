"""A run under way on the terminal: say what will run and why, show progress, show what came of it."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import slimgrad
from slimgrad.budget.available import free_bytes
from slimgrad.budget.plan import Plan
from slimgrad.budget.process import peak_resident_bytes
from slimgrad.bytelm import (
    Cost,
    Row,
    RunFolder,
    Task,
    TrainConfig,
    Trained,
    build_model,
    generate,
    measure_gradient,
    open_model,
    pick_device,
    plan_schedule,
    split_corpus,
    train,
    validate,
)
from slimgrad.cli.budgeted import peak_in_words
from slimgrad.cli.curve import picture, sketch, smooth
from slimgrad.cli.screen import Screen
from slimgrad.cli.sweeping import SweepBar
from slimgrad.cli.texts import is_path
from slimgrad.cli.trackers import open_tracker
from slimgrad.cli.words import megabytes, printable
from slimgrad.data import END, Corpus, Windows, as_share
from slimgrad.errors import SlimgradError
from slimgrad.runs.stopping import Interrupted, Stop

SAMPLE_BYTES = 600
PROMPT_BYTES = 64
SEARCHED_BYTES = 32_768
TEMPERATURE = 0.7
MEASURED_BYTES, COMPARED = 16_384, "memory.json"
FREE_BYTES = 2_000_000_000  # for plain backpropagation over so many
SAID_EVERY = 60.0  # seconds, where there is no terminal
_UNWRAPPED = 10_000  # columns


def describe(config: TrainConfig, corpus: Corpus | None, origin: str, plan: Plan | None = None) -> dict[str, str]:
    """The resolved run in words, with the reason for each choice."""
    model, shape = build_model(config), config.model
    parameters = sum(p.numel() for p in model.parameters())
    budget = (
        {} if config.memory is None else {"memory": f"{config.memory}: {config.method} has no plan, but ends there"}
    )
    if plan is not None:
        of_chunk = [reason for reason in plan.reasons if reason.startswith("chunk") or " in its place" in reason]
        memory = "; ".join(of_chunk).removeprefix("chunk ")
        reason = "; ".join(reason for reason in plan.reasons if reason not in of_chunk)
        budget["memory"] = (
            f"{config.memory}: at most {megabytes(plan.peak)} and {plan.seconds:,.3g} s for a gradient over "
            f"{plan.length:,} bytes, predicted"
        )
    elif config.method == "chunked":
        chunks = math.ceil(config.length / config.chunk)
        memory = f"{config.chunk:,} bytes: only one chunk's graph lives at a time, of {chunks} in a sequence"
        reason = plan_schedule(config, model)[1]
    else:
        memory, reason = "none", f"{config.method}: memory grows with the length of the sequence"
    return {
        "corpus": _describe_corpus(config, corpus),
        "model": f"{origin}: {shape.layers} layers, width {shape.width}, {shape.heads} heads, "
        f"{parameters / 1e6:.2f} million parameters",
        "sequences": f"{config.steps:,} step{'s' if config.steps > 1 else ''}, {_describe_sequences(config, corpus)}",
        **budget,
        "chunk": memory,
        "schedule": reason,
        "optimiser": f"{config.optimizer}, learning rate {config.learning_rate:g} {_describe_rate(config)}, "
        f"{config.precision} on {pick_device(config.device).type}",
        "software": f"slimgrad {slimgrad.__version__}, torch {torch.__version__}, {_threads()}, seed {config.seed}",
    }


def _describe_corpus(config: TrainConfig, corpus: Corpus | None) -> str:
    if corpus is None:
        return f"copying: sequences of {config.length:,} symbols, made as they are needed"
    few = f"{len(split_corpus(config, corpus).validation):,} for validation, "
    share = as_share(config.validation)
    if corpus.validation is not None:
        where = f"from {config.validation}" if is_path(config.validation) else "from its own validation part"
    elif share is not None:
        where = f"the last {share:.3g} of each document"
    else:
        where = "the last ones" if config.validation == END else "from all over it"
    return f"{corpus.name}: {len(corpus.text):,} bytes from {corpus.source}; {few}{where}"


def _describe_sequences(config: TrainConfig, corpus: Corpus | None) -> str:
    each = config.batch * config.accumulate
    together = "" if each == 1 else f"{each} sequences a step ({config.batch} at once), "
    if config.windows == "documents":
        return f"{together}whole documents of up to {config.length:,} bytes"
    lengths = config.step_lengths()
    growth = f"each of {config.length:,} bytes: "
    if lengths[0] != config.length:
        growth = f"the first of {lengths[0]:,} bytes, doubling up to {config.length:,}: "
    elif corpus is not None and config.length == len(split_corpus(config, corpus).train):
        growth = f"each the whole training text of {config.length:,} bytes as one sequence: "
    return f"{together}{growth}{sum(lengths) * each / 1e6:.1f} MB in all"


def _describe_rate(config: TrainConfig) -> str:
    then = {
        "cosine": "then a cosine", "linear": "then a straight line", "constant": "then constant",
        "drop": "a tenth of it after two thirds",
    }  # fmt: skip
    return f"after {config.warmup:.0%} warm-up, {then[config.decay]}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def run_console() -> Console:
    """For a run: its lines are not wrapped in a file, and it may go away."""
    screen: Any = Screen()
    console = Console(highlight=False, file=screen)
    return console if console.is_terminal else Console(highlight=False, file=screen, width=_UNWRAPPED)


class Session:
    """One process' work on a run."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus | None,
        task: Task,
        folder: RunFolder,
        *,
        plan: Plan | None = None,
        log: str | None = None,
        finetuning: bool = False,
        compare: bool = True,
    ) -> None:
        self.config, self.corpus, self.task, self.folder, self.plan = config, corpus, task, folder, plan
        self.name = "copying" if corpus is None else corpus.name
        self.console = run_console()
        self._finetuning, self._compare = finetuning, compare
        self._tracker = None if log is None else open_tracker(log, folder, config)

    def run(self, settings: dict[str, str]) -> None:
        """Train; then leave the curve, a sample, and what a gradient costs in the folder, and show them."""
        began = time.perf_counter()
        console = self.console
        _print_settings(console, {**settings, "results": str(self.folder.path)})
        if self._finetuning:
            self._show_before()
        trained = self._train()
        if trained.rows:  # a finished run whose metrics were removed has none
            self._show("the curve", lambda: self._show_curve(trained))
        if self.corpus is not None:
            self._show("the sample", lambda: self._show_sample(trained))
        if self.config.memory is not None:
            console.print(f"\n[bold]Memory[/]: {peak_in_words(self.config.memory, self.plan)}")
        elif self._finetuning:
            console.print(f"\nat most [bold]{megabytes(peak_resident_bytes())}[/] resident in this process")
        elif self.config.method == "chunked" and self._compare and not (self.folder.path / COMPARED).exists():
            self._show("the comparison", self._show_memory)
        where = escape(str(self.folder.path))
        console.print(f"\n{time.perf_counter() - began:.0f} s in all; everything is in [bold]{where}[/]")

    def _show(self, what: str, show: Callable[[], None]) -> None:
        """What comes at the end stands by itself: where it fails, the run is there all the same, and so is the rest."""
        try:
            show()
        except SlimgradError:
            raise
        except Exception as error:  # noqa: BLE001
            self.console.print(f"\n{what}: left out, since {type(error).__name__}: {escape(str(error))}")

    def _show_before(self) -> None:
        model, _ = open_model(self.folder.path)
        bits, _ = validate(self.config, model, self.task)
        self.console.print(f"before the first step  validation [bold]{bits:.3f}[/] bits/byte")

    def _train(self) -> Trained:
        stop, console = Stop(), self.console
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"))
        with ExitStack() as stack:
            stack.enter_context(stop.listening())
            progress = stack.enter_context(Progress(*columns, console=console))
            if self._tracker is not None:
                stack.callback(self._tracker.close)
            ends = list(itertools.accumulate(self.config.step_lengths()))
            bar = progress.add_task("starting", total=ends[-1])
            recent: list[Row] = []
            began = said = time.perf_counter()
            first = ends[self.folder.snapshot.step - 1] if self.folder.snapshot and self.folder.snapshot.step else 0

            def report(row: Row) -> None:
                nonlocal said
                recent[:] = [*recent[-19:], row]
                bits = sum(r.bits for r in recent) / len(recent)
                speed = sum(r.num_bytes for r in recent) / sum(r.num_bytes / r.bytes_per_second for r in recent)
                words = f"{bits:.2f} bits/byte  {speed:,.0f} bytes/s  {megabytes(row.resident_bytes)}"
                progress.update(bar, completed=ends[row.step - 1], description=words)
                now = time.perf_counter()
                if not console.is_terminal and now - said >= SAID_EVERY:
                    said = now
                    left = (now - began) * (ends[-1] - ends[row.step - 1]) / max(ends[row.step - 1] - first, 1)
                    progress.console.print(
                        f"{datetime.now():%Y-%m-%d %H:%M:%S}  step {row.step:,} of {self.config.steps:,}  {words}  "
                        f"{timedelta(seconds=round(left))} left"
                    )
                if row.validation_bits is not None:
                    progress.console.print(
                        f"step {row.step:>6,}  training {bits:.3f}  validation [bold]{row.validation_bits:.3f}[/] "
                        f"bits/byte, {row.validation_accuracy:.1%} right"
                    )
                if self._tracker is not None:
                    self._tracker(row)

            try:
                sweeps = SweepBar(progress, self.config)
                trained = train(self.config, self.corpus, report, run=self.folder, stop=stop, on_chunk=sweeps)
                stop.check()
            except Interrupted as interrupted:
                saved = self.folder.snapshot
                if saved is not None:
                    path = self.folder.path
                    interrupted.add_note(f"saved after step {saved.step:,}. Go on: slimgrad train --resume {path}")
                raise
        return trained

    def _show_curve(self, trained: Trained) -> None:
        self.folder.write("curve.png", picture(trained.rows, f"{self.name}: loss while training"))
        bits = smooth([row.bits for row in trained.rows], max(1, len(trained.rows) // 40))
        self.console.print("\n[bold]Training loss[/], bits per byte over the steps")
        for line in sketch(bits, unicode=(self.console.encoding or "").startswith("utf")):
            self.console.print(f"  {line}", markup=False)
        self.console.print(f"  validation after the last step: [bold]{trained.validation_bits:.3f}[/] bits per byte")

    def _show_sample(self, trained: Trained) -> None:
        first = next(iter(self.task.validation())).sequences[0]
        beginning = first.read(0, min(SEARCHED_BYTES, first.length)) if isinstance(first, Windows) else first
        prompt = choose_prompt(bytes(beginning[0, :SEARCHED_BYTES].tolist()))
        text = generate(trained.model, prompt, SAMPLE_BYTES, temperature=TEMPERATURE, seed=self.config.seed)
        self.folder.write("sample.txt", prompt + text)
        self.console.print(
            f"\n[bold]Sample[/], going on from [cyan]a prompt[/] of the validation text, temperature {TEMPERATURE}"
        )
        shown = f"[cyan]{escape(_text(prompt))}[/]{escape(_text(text))}"
        self.console.print(Padding(shown, (0, 0, 0, 2), expand=False))

    def _show_memory(self) -> None:
        """One gradient each way, in a process of its own, over no more than plain backpropagation has memory for."""
        config, console = self.config, self.console
        length = min(config.length, MEASURED_BYTES)
        free = free_bytes(torch.device("cpu"))
        if free is not None and free < FREE_BYTES:
            console.print(
                f"\nOne gradient is not compared with plain backpropagation, which may take {megabytes(FREE_BYTES)}: "
                f"{megabytes(free)} are free"
            )
            return
        console.print(f"\n[bold]One gradient[/] over {length:,} bytes, each way in a process of its own")
        ours = measure_gradient(config.model, length=length, chunk=config.chunk, method="chunked")
        plain = measure_gradient(config.model, length=length, chunk=config.chunk, method="plain")
        table = Table.grid(padding=(0, 3))
        for name, cost in ((f"slimgrad, chunks of {config.chunk:,}", ours), ("plain backpropagation", plain)):
            table.add_row(f"  {name}", f"[bold]{megabytes(cost.peak_bytes)}[/]", _seconds(cost))
        console.print(table)
        if ours.peak_bytes and plain.peak_bytes and ours.peak_bytes < plain.peak_bytes:
            console.print(f"  the same gradient in [bold]1/{plain.peak_bytes / ours.peak_bytes:.1f}[/] of the memory")
        costs = {"length": length, "slimgrad": vars(ours), "plain": vars(plain)}
        self.folder.write(COMPARED, (json.dumps(costs, indent=2) + "\n").encode())


def _print_settings(console: Console, settings: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, words in settings.items():
        table.add_row(f"[bold]{name}[/]", escape(words))
    console.print(table)
    console.print()


def choose_prompt(text: bytes) -> bytes:
    """`PROMPT_BYTES` bytes from the start of a line (or of the text): those with the most letters, which are prose."""
    starts = [0, *(i + 1 for i, byte in enumerate(text) if byte == ord("\n"))]
    pieces = [text[start : start + PROMPT_BYTES] for start in starts if start < len(text)]
    return max(pieces, key=lambda piece: sum(chr(byte).isalpha() for byte in piece if byte < 128))


def _seconds(cost: Cost) -> str:
    return cost.note or f"{cost.seconds:.1f} s"


def _text(content: bytes) -> str:
    return printable(content.decode("utf-8", errors="replace"))
