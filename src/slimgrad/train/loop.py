"""The training loop: exact gradients over whole sequences, in the memory of one chunk.

One step is one window of the corpus, one call of `slimgrad.backward` and one step of AdamW. The order of the windows
and the parameters follow from the seed, and with the same number of threads two runs agree in every bit.
Cost: per step, one gradient (see `slimgrad.backward`); memory does not depend on the windows' length.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimgrad.api import backward, evaluate
from slimgrad.budget import choose_schedule
from slimgrad.data import consecutive_windows, shuffled_starts, split_bytes
from slimgrad.errors import NonFiniteError
from slimgrad.models.performer import Performer
from slimgrad.sweep import tree
from slimgrad.sweep.schedule import Schedule
from slimgrad.sweep.state import PrefixSum
from slimgrad.train.config import TrainConfig
from slimgrad.train.memory import resident_bytes


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one step measured.

    Attributes:
        step: from 1.
        length: bytes of this step's window.
        bytes_seen: training bytes so far.
        seconds: since the first step began, validation included.
        bits: training loss of this step's window, before the step, in bits per byte.
        validation_bits: after this step, in bits per byte; None where it was not measured.
        learning_rate: of this step.
        gradient_norm: before clipping.
        bytes_per_second: of this step, validation not included.
        resident_bytes: memory of the process after the step; None where the platform does not tell.
    """

    step: int
    length: int
    bytes_seen: int
    seconds: float
    bits: float
    validation_bits: float | None
    learning_rate: float
    gradient_norm: float
    bytes_per_second: float
    resident_bytes: int | None


Report = Callable[[Row], None]


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
    state = model.initial_state(1)
    plain_bytes = sum(leaf.nbytes for leaf in tree.tensors(state))
    sum_bytes = sum(8 * leaf.shape.numel() for leaf in tree.leaves(state) if isinstance(leaf, PrefixSum))
    return choose_schedule(plain_bytes, sum_bytes, math.ceil(config.length / config.chunk))


def train(config: TrainConfig, data: Tensor, report: Report | None = None) -> Trained:
    """Train a Performer on bytes.

    Args:
        config: the run.
        data: uint8 `[bytes]`; the last `config.validation_bytes` are kept for validation.
        report: called after every step.

    Raises:
        InputError: the data is too short. Before any work.
        NonFiniteError: the loss or the gradient is no longer a finite number.
    """
    split = split_bytes(data, validation=config.validation_bytes, window=config.length)
    model = build_model(config)
    schedule, _ = plan_schedule(config, model)
    optimizer = make_optimizer(config, model)
    lengths = config.step_lengths()
    windows = training_windows(lengths, split.train, config.seed)
    total, seen = sum(lengths), 0
    rows: list[Row] = []
    began = time.perf_counter()
    for step, window in enumerate(windows, start=1):
        step_began = time.perf_counter()
        before, seen = seen, seen + len(window)
        rate = learning_rate_at(config, before / total, seen / total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = float(backward(model, window, chunk=config.chunk, schedule=schedule).loss)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
        _require_finite(step, loss, norm, rate)
        optimizer.step()
        optimizer.zero_grad()
        step_seconds = time.perf_counter() - step_began
        validates = seen * config.validations // total > before * config.validations // total
        row = Row(
            step=step,
            length=len(window),
            bytes_seen=seen,
            validation_bits=validate(config, model, split.validation) if validates else None,
            seconds=time.perf_counter() - began,
            bits=loss / math.log(2),
            learning_rate=rate,
            gradient_norm=norm,
            bytes_per_second=len(window) / step_seconds,
            resident_bytes=resident_bytes(),
        )
        rows.append(row)
        if report is not None:
            report(row)
    return Trained(model=model, rows=rows)


def training_windows(lengths: list[int], data: Tensor, seed: int) -> Iterator[Tensor]:
    """One window of the data for each length; a run of equal lengths goes through the data in passes."""
    generator = torch.Generator().manual_seed(seed)
    for length, run in itertools.groupby(lengths):
        for _, start in zip(run, shuffled_starts(len(data), length, generator), strict=False):
            yield data[start : start + length]


def validate(config: TrainConfig, model: Performer, data: Tensor) -> float:
    """Bits per byte over consecutive windows of the training length (or all of `data`, where it is shorter).

    Each window starts from nothing, so its first bytes are harder than the rest.
    """
    length = min(config.length, len(data))
    results = [evaluate(model, window, chunk=config.chunk) for window in consecutive_windows(data, length)]
    total = sum(float(result.loss) * result.num_targets for result in results)
    return total / sum(result.num_targets for result in results) / math.log(2)


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_at(config: TrainConfig, before: float, after: float) -> float:
    """A straight rise over the warm-up, then half a cosine down to zero.

    Args:
        config: the run.
        before, after: the fractions of all training bytes that were seen before a step, and are after it.
    """
    if after <= config.warmup:
        return config.learning_rate * after / config.warmup
    done = max(before - config.warmup, 0.0) / (1 - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _require_finite(step: int, loss: float, norm: float, rate: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(
            f"step {step}: expected a finite loss and gradient, got loss {loss} and gradient norm {norm} at learning "
            f"rate {rate:.1e}. Lower the learning rate"
        )
