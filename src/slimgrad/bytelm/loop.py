"""The training loop: exact gradients over whole sequences, in the memory of one chunk.

One step is one or several batches of the task, a gradient each, and one step of the optimiser. Everything random
follows from the seed and the step's number, so a run that goes on from a snapshot agrees in every bit with one that was
never stopped, as long as the number of threads, the processor and the version of torch are the same.
Cost: per step, one gradient (see `gradient`); memory does not depend on the length of the sequences. A gradient that
takes long is saved on its way (see `journalled`), if it is that of one batch of windows: of several batches, and of
whole documents, what is lost with a kill is the step at hand.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.api import evaluate
from slimgrad.budget import choose_schedule
from slimgrad.budget.process import resident_bytes
from slimgrad.bytelm.config import TrainConfig
from slimgrad.bytelm.device import pick_device
from slimgrad.bytelm.folder import RunFolder, seconds_so_far
from slimgrad.bytelm.gradient import add_gradient
from slimgrad.bytelm.journalled import GradientJournal, Pace, saved_gradient
from slimgrad.bytelm.memory import out_of_memory
from slimgrad.bytelm.optimizer import learning_rate_at, make_optimizer, set_learning_rate
from slimgrad.bytelm.row import Report, Row
from slimgrad.bytelm.task import Task, make_task
from slimgrad.call.losses import cross_entropy_sum, is_counted
from slimgrad.data import Batch, Corpus
from slimgrad.errors import InputError, NonFiniteError, StorageError
from slimgrad.models.performer import Performer
from slimgrad.runs.stopping import Interrupted, Stop
from slimgrad.states.accumulator import kept_bytes
from slimgrad.states.sums import PrefixSum
from slimgrad.sweep import tree
from slimgrad.sweep.program import OnChunk
from slimgrad.sweep.random import derive_seed, seeded
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.names import parse_schedule

SECONDS_BETWEEN_SNAPSHOTS = 60.0
_VALIDATIONS = 5


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run: the model, and what each step measured."""

    model: Performer
    rows: list[Row]

    @property
    def validation_bits(self) -> float:
        """After the last step, in bits per byte."""
        bits = self.rows[-1].validation_bits
        assert bits is not None
        return bits


def build_model(config: TrainConfig) -> Performer:
    """The model before the first step. Leaves the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Performer(config.model)


def plan_schedule(config: TrainConfig, model: Performer) -> tuple[Schedule, str]:
    """The schedule of every step, and the reason for it in words."""
    named = parse_schedule(config.schedule)
    if named is not None:
        return named, f"{named}, as asked for"
    state = model.initial_state(config.batch)
    plain_bytes = sum(leaf.nbytes for leaf in tree.tensors(state))
    sum_bytes = sum(kept_bytes(leaf.shape, leaf.dtype) for leaf in tree.leaves(state) if isinstance(leaf, PrefixSum))
    return choose_schedule(plain_bytes, sum_bytes, math.ceil(config.length / config.chunk))


def train(
    config: TrainConfig,
    corpus: Corpus | None = None,
    report: Report | None = None,
    *,
    run: RunFolder | None = None,
    weights: Mapping[str, Tensor] | None = None,
    stop: Stop | None = None,
    on_chunk: OnChunk | None = None,
    pace: Pace | None = None,
) -> Trained:
    """Train a Performer on bytes, or on the copying task.

    Args:
        config: the run.
        corpus: the text; None for copying.
        report: called after every step.
        run: where metrics and snapshots go, and from whose snapshot the run goes on; None: nothing is written.
        weights: parameters to begin with, in place of random ones (a snapshot's go first).
        stop: asked whether a signal has come.
        on_chunk: called with an `Event` after each chunk of a gradient that can be saved on its way.
        pace: when gradients are saved on their way; None: from a minute on.

    Raises:
        InputError: the text is too short, or a gradient that was saved on its way cannot be gone on with. Before any
            work.
        NonFiniteError: the loss or the gradient is no longer a finite number. The snapshots are those before.
        StorageError: something cannot be written.
        MemoryLimitError: memory ran out.
        Interrupted: a signal came; with `run`, everything up to the last whole step is saved, and the gradient at hand
            if it has taken long.
    """
    task = make_task(config, corpus)
    trainer = _Trainer(config, task, run, stop or Stop(), weights, on_chunk, pace or Pace())
    rows = run.rows() if run else []
    for row in trainer.rows():
        rows.append(row)
        if report is not None:
            report(row)
    return Trained(model=trainer.model, rows=rows)


class _Trainer:
    """A run under way: parameters, moments, and how far it has come."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        run: RunFolder | None,
        stop: Stop,
        weights: Mapping[str, Tensor] | None,
        on_chunk: OnChunk | None,
        pace: Pace,
    ) -> None:
        self.config, self.task, self.run, self.stop = config, task, run, stop
        self.model = build_model(config)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.to(pick_device(config.device))
        self.optimizer = make_optimizer(config, self.model)
        self.schedule, _ = plan_schedule(config, self.model)
        self.step, self.seen = run.load(self.model, self.optimizer) if run else (0, 0)
        self._saved_step = self.step if run and run.snapshot else -1
        self._earlier_seconds = seconds_so_far(run.path) if run else 0.0
        self.journal = None if run is None else self._open_journal(run, pace, on_chunk)
        lengths = config.step_lengths()
        self._ends = list(itertools.accumulate(lengths))
        self._began = self._saved_at = time.perf_counter()

    def _open_journal(self, run: RunFolder, pace: Pace, on_chunk: OnChunk | None) -> GradientJournal:
        saved, method = saved_gradient(run.path, self.step + 1), self.config.method
        if saved is not None and method != "chunked":
            raise InputError(
                f"{saved}: expected to go on with the gradient of step {self.step + 1}, which was begun with --method "
                f"chunked, got {method}. Change it when that step is done, or remove {saved.parent} to begin it anew"
            )
        return GradientJournal(
            run.path, self.step + 1, pace=pace, stop=self.stop, before_first_save=self._save, on_chunk=on_chunk
        )

    def rows(self) -> Iterator[Row]:
        """Do the steps that are left, each with its row; save as often as the configuration says, and at the end."""
        self._save()
        batches = self.task.batches(first=self.step * self.config.accumulate)
        while self.step < self.config.steps:
            with out_of_memory(f"step {self.step + 1}", self.config.chunk):
                step_batches = list(itertools.islice(batches, self.config.accumulate))
                row = self._one_step(self.step + 1, step_batches)
            if self.run is not None:
                self.run.add(row)
            if self._save_is_due():
                self._save()
            yield row
        self._save()

    def _one_step(self, number: int, batches: list[Batch]) -> Row:
        try:
            return self._step_and_validate(batches)
        except NonFiniteError as error:
            if self.run is not None and self._saved_step == self.step:  # then these parameters are what was saved
                self.run.distrust()
            saved = None if self.run is None else self.run.snapshot
            how = "" if saved is None else f", in a new run: slimgrad train --init {saved.path} --learning-rate ..."
            raise NonFiniteError(f"step {number}: {error}. {self._last_good()}Lower the learning rate{how}") from error

    def _step_and_validate(self, batches: list[Batch]) -> Row:
        config, model, began = self.config, self.model, time.perf_counter()
        before, after, end = self._shares(self.step)
        rate = learning_rate_at(config.part_at(self.step)[1], before / end, after / end)
        set_learning_rate(self.optimizer, rate)
        loss = self._gradient(batches)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"expected a finite loss and gradient, got loss {loss} and gradient norm {norm} at learning rate "
                f"{rate:.1e}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        num_bytes = sum(batch.num_bytes for batch in batches)
        self.step, self.seen = self.step + 1, self.seen + num_bytes
        step_seconds = time.perf_counter() - began + (self.journal.seconds_before if self.journal else 0.0)
        bits, accuracy = validate(config, model, self.task) if self._validates() else (None, None)
        return Row(
            step=self.step,
            length=max(batch.longest for batch in batches),
            num_bytes=num_bytes,
            bytes_seen=self.seen,
            seconds=self._earlier_seconds + time.perf_counter() - self._began,
            bits=loss / math.log(2),
            validation_bits=bits,
            validation_accuracy=accuracy,
            learning_rate=rate,
            gradient_norm=norm,
            bytes_per_second=num_bytes / step_seconds,
            resident_bytes=resident_bytes(),
        )

    def _gradient(self, batches: list[Batch]) -> float:
        """The loss of this step, its gradient in `.grad`. A signal throws that away, and saves the rest."""
        config, model, journal = self.config, self.model, self.journal
        normalizer = max(sum(batch.num_targets for batch in batches), 1)
        how: dict[str, Any] = {"method": config.method, "chunk": config.chunk, "schedule": self.schedule}
        alone = len(batches) == 1 and not isinstance(batches[0].inputs, list)
        interruptible = self.stop.interruptible
        if journal is not None and config.method == "chunked" and alone:
            how["carry_out"] = functools.partial(journal.add_gradient, self.step + 1)
            interruptible = nullcontext  # it sees to signals itself
        seed = derive_seed(config.seed, self.step)
        loss = 0.0
        try:
            with interruptible(), autocast(config, model):
                for index, batch in enumerate(batches):
                    with seeded(derive_seed(seed, index), model.head.weight.device):
                        loss += add_gradient(model, batch, normalizer=normalizer, **how)
            return loss
        except Interrupted:
            self.optimizer.zero_grad()
            self._save()
            raise

    def _shares(self, step: int) -> tuple[int, int, int]:
        """Of the part of the run in which step `step + 1` is: bytes seen before that step, after it, and at its end."""
        before, part = self.config.part_at(step)
        begin, *seen = (self._ends[i - 1] if i else 0 for i in (before, step, step + 1, part.steps))
        return seen[0] - begin, seen[1] - begin, seen[2] - begin

    def _validates(self) -> bool:
        if self.config.eval_every is not None:
            return self.step % self.config.eval_every == 0 or self.step == self.config.steps
        before, after, end = self._shares(self.step - 1)
        return after * _VALIDATIONS // end > before * _VALIDATIONS // end

    def _save_is_due(self) -> bool:
        if self.journal is not None and self.journal.is_saved:
            return True
        if self.config.save_every is not None:
            return self.step % self.config.save_every == 0
        return time.perf_counter() - self._saved_at > SECONDS_BETWEEN_SNAPSHOTS

    def _save(self) -> None:
        if self.run is None or self._saved_step == self.step:
            return
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise NonFiniteError(
                f"step {self.step}: expected finite parameters, some are not. {self._last_good()}Lower the learning "
                "rate"
            )
        try:
            self.run.save(step=self.step, bytes_seen=self.seen, model=self.model, optimizer=self.optimizer)
        except StorageError as error:
            raise StorageError(f"{error}. {self._last_good()}Go on from there: --resume {self.run.path}") from error
        self._saved_step, self._saved_at = self.step, time.perf_counter()
        if self.journal is not None:
            self.journal.forget(self.step)

    def _last_good(self) -> str:
        if self.run is None:
            return ""
        if self.run.snapshot is None:
            return "There is no good snapshot before it. "
        return f"The last good snapshot is {self.run.snapshot.path}. "


def autocast(config: TrainConfig, model: Performer) -> AbstractContextManager[Any]:
    """The run's precision."""
    return torch.autocast(model.head.weight.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def validate(config: TrainConfig, model: Performer, task: Task) -> tuple[float, float]:
    """Bits per byte, and the fraction of bytes that are the likeliest, over the task's validation sequences.

    Each sequence starts from nothing, so its first bytes are harder than the rest.
    """
    total, right, count = 0.0, 0.0, 0
    with seeded(config.seed, model.head.weight.device), autocast(config, model):
        for batch in task.validation():
            result = evaluate(model, batch.inputs, batch.targets, chunk=config.chunk, loss_fn=loss_and_accuracy)
            total += float(result.loss) * result.num_targets
            right += float(result.metrics["right"])
            count += result.num_targets
    return total / count / math.log(2), right / count


def loss_and_accuracy(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Summed cross-entropy in nats, and how many targets have the highest logit."""
    right = (outputs.argmax(-1) == targets) & is_counted(targets)
    return {"loss": cross_entropy_sum(outputs, targets), "right": right.sum()}
