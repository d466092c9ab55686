"""What a budget buys for a run: a plan for its longest sequences, with the optimiser's moments in the account.

What else there is: plain backpropagation and per-layer checkpointing beside it, by a straight line through two short
sequences, since a whole one may not fit.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimgrad.budget.available import slack
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.measure import measure_seconds
from slimgrad.budget.plan import Plan
from slimgrad.budget.planning import Request, make_plan
from slimgrad.budget.probe import as_it_was
from slimgrad.budget.process import resident_bytes
from slimgrad.budget.size import parse_bytes
from slimgrad.bytelm.config import TrainConfig
from slimgrad.bytelm.device import pick_device
from slimgrad.bytelm.gradient import add_gradient
from slimgrad.bytelm.loop import autocast, build_model
from slimgrad.call.arguments import DEFAULT_CHUNK, Options
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.data import Batch
from slimgrad.errors import InputError
from slimgrad.models.performer import Performer
from slimgrad.sweep.schedules.names import parse_schedule, schedule_as_text

PROBED = (256, 512)  # bytes of the sequences from which other methods' costs are extrapolated
_TIMES = 2
_MOMENTS = 2  # of AdamW, each as large as the parameters
_COPYING = 24  # bytes of memory for each symbol of the copying task: int64 sequence and targets, and what makes them
_FIRST, _SECOND = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)  # odd numbers that mix bits


class RandomBytes:
    """Sequences of random bytes, as a `slimgrad.Reader`: computed from their positions, so none is in memory.

    Args:
        batch: sequences side by side.
        length: bytes of each.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 `[batch, stop - start]`."""
        mixed = torch.arange(start, stop) + self.length * torch.arange(self.batch)[:, None]
        for factor in (_FIRST, _SECOND):
            mixed = mixed * factor
            mixed ^= mixed >> 29
        return (mixed & 255).to(torch.uint8)


def gradient_request(config: TrainConfig, model: Performer) -> Request:
    """One gradient of a run over its longest sequences, and what the process will hold beside it."""
    moments = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    reserved = {"optimiser": _MOMENTS * moments}
    if config.accumulate > 1:
        reserved["gradients of earlier batches"] = moments
    if config.task == "copying":
        reserved["sequences"] = _COPYING * config.batch * config.length
    batch = 1 if config.windows == "documents" else config.batch  # of documents one at a time
    options = Options(None, DEFAULT_CHUNK, parse_schedule(config.schedule), cross_entropy_sum, "targets", None, None)
    return Request(model, RandomBytes(batch, config.length), None, options, reserved=reserved)


def plan_run(config: TrainConfig) -> Plan | None:
    """The plan of every step of a run whose configuration states a budget.

    Returns:
        It; None for methods that have no chunks to choose, and for a run without a budget.

    Raises:
        InputError: the budget cannot be met: with the smallest that can.

    Cost: a few chunks of a model that is made for it, forward and back.
    """
    if config.memory is None:
        return None
    if config.method != "chunked":
        held, budget = resident_bytes(), parse_bytes(config.memory)
        if held is not None and budget <= held:
            raise InputError(
                f"memory of {budget / 1e6:,.1f} MB: expected more than the {held / 1e6:,.1f} MB that this process "
                "holds before any work"
            )
        return None
    model = build_model(config).to(pick_device(config.device))
    with autocast(config, model):
        return make_plan(gradient_request(config, model), config.memory)


def as_planned(config: TrainConfig, plan: Plan | None) -> TrainConfig:
    """The configuration with the plan's chunk and schedule."""
    return config if plan is None else config.replace(chunk=plan.chunk, schedule=schedule_as_text(plan.schedule))


@dataclass(frozen=True)
class Extrapolated:
    """What one gradient takes by another method.

    Attributes:
        num_bytes: beside weights, optimiser and all that the process held before.
        seconds: for it.
        from_lengths: bytes of the sequences that were measured.
    """

    num_bytes: int
    seconds: float
    from_lengths: tuple[int, ...]


def extrapolate(
    config: TrainConfig, model: Performer, method: Literal["plain", "checkpoint"], length: int
) -> Extrapolated:
    """What one gradient of a run takes by a method that holds the whole sequence.

    Bytes and seconds of two short sequences, and a straight line through them: with sums as state both are linear in
    the length. Live bytes are counted; the allocator's share is that of large blocks.
    """
    lengths = tuple(min(probed, max(2, length * probed // PROBED[-1])) for probed in PROBED)
    live: list[float] = []
    seconds: list[float] = []
    with as_it_was(model), autocast(config, model):
        for probed in lengths:
            batch = Batch(RandomBytes(config.batch, probed).read(0, probed))

            def work(batch: Batch = batch) -> None:
                model.zero_grad()
                add_gradient(model, batch, method=method, chunk=1, schedule=None, normalizer=1.0)

            work()  # warms up
            model.zero_grad()
            gc.collect()
            with LiveBytes() as counted:
                work()
            live.append(counted.peak)
            seconds.append(min(measure_seconds(work, model.head.weight.device.type) for _ in range(_TIMES)))
    model.zero_grad()
    num_bytes = _line(lengths, live, length)
    num_bytes += slack(model.head.weight.device).of(num_bytes, 0)
    return Extrapolated(int(num_bytes), _line(lengths, seconds, length), lengths)


def _line(lengths: tuple[int, ...], values: list[float], length: int) -> float:
    """Through two points; through the second and nothing at length 0 where noise made the first larger."""
    (first, last), (low, high) = lengths, values
    slope = (high - low) / (last - first) if last > first else math.inf
    return high * length / last if not 0 < slope < math.inf else high + slope * (length - last)
