"""A Hugging Face model on the terminal: what was found and chosen, progress, what came of it; its certificate."""

from __future__ import annotations

import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from slimgrad.cli.words import megabytes
from slimgrad.errors import InputError
from slimgrad.extras import require_extra

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else every try to reach the hub is told
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else, of a kernel that is not there
require_extra("hf", "a Hugging Face model")

import datasets  # noqa: E402  # after what they read when they are imported
import transformers  # noqa: E402

from slimgrad.budget.available import set_malloc  # noqa: E402
from slimgrad.hf.certifying import certify  # noqa: E402
from slimgrad.hf.tuning import Settings, Tuned, finetune, resume  # noqa: E402
from slimgrad.hf.tuning.loading import Source  # noqa: E402

_LINES = 100  # in a file


def run_tuning(
    model: str | None, data: str | None, *, resume: Path | None, out: Path | None, given: dict[str, Any]
) -> None:
    """Fine-tune, or go on with it."""
    if "memory" in given:
        set_malloc("returned")  # and no more: each batch has a plan of its own, and a heap that has kept much keeps it
    _quiet()
    console = Console(highlight=False)

    def say(name: str, words: str) -> None:
        console.print(f"[bold]{name}[/]  {escape(words)}", soft_wrap=True)

    shown: list[transformers.TrainerCallback] = [_Progress(console)]
    if resume is not None:
        if out is not None and out != resume:
            raise InputError(f"--out {out}: --resume {resume} goes on in its own folder. Leave --out out")
        named = {name: value for name, value in (("model", model), ("data", data)) if value is not None}
        tuned = _resume(resume, {**named, **given}, say=say, callbacks=shown)
    else:
        assert model is not None
        assert data is not None
        if not Path(model).exists():
            say("model", f"{model}: no such folder here; asking Hugging Face for it")
        tuned = finetune(Settings(model=model, data=data, **given), out=out, say=say, callbacks=shown)
    _show(console, tuned)


_resume = resume


def run_certification(model: str) -> bool:
    """Print a model's certificate; return whether it is exact in chunks."""
    _quiet()
    certificate = certify(Source.open(model).blank)
    print(certificate)
    return certificate.is_exact


def _quiet() -> None:
    """What these libraries tell each other is not for the user."""
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    for package in ("transformers", "peft", "accelerate", "datasets", "bitsandbytes", "torch"):
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")


def _show(console: Console, tuned: Tuned) -> None:
    steps, kind = "step" if tuned.steps == 1 else "steps", "adapter" if tuned.is_adapter else "model"
    console.print(
        f"\n{tuned.steps:,} {steps}, {tuned.seconds:.0f} s, at most [bold]{megabytes(tuned.peak_bytes)}[/] held; the "
        f"{kind} and its tokenizer are in [bold]{escape(str(tuned.path))}[/], and load without slimgrad:",
        soft_wrap=True,
    )
    for line in tuned.how_to_load():
        console.print(f"  {line}", markup=False, soft_wrap=True)


class _Progress(transformers.TrainerCallback):
    """A bar over the steps, with the loss, tokens per second and memory; in a file, at most a hundred lines of them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = TaskID(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self._task = self._bar.add_task("the first step", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After each step."""
        if not logs or "loss" not in logs:
            return
        speed, peak = logs.get("train_tokens_per_second"), logs.get("peak_memory_mb")
        words = f"step {state.global_step:,}  loss {logs['loss']:.3f}"
        words += "" if speed is None else f"  {speed:,.0f} tokens/s"
        words += "" if peak is None else f"  {peak:,} MB"
        self._bar.update(self._task, completed=state.global_step, description=words)
        if not self._console.is_terminal and state.global_step % math.ceil(state.max_steps / _LINES) == 0:
            self._console.print(words, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
