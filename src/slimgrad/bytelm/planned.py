"""What a budget buys for a run: a plan for its longest sequences, with the optimiser's moments in the account.

What else there is: plain backpropagation and per-layer checkpointing beside it, by a straight line through two short
sequences, since a whole one may not fit.
"""

from __future__ import annotations

import functools
import gc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgrad.budget.available import slack
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.measure import measure_in_turn
from slimgrad.budget.plan import Plan
from slimgrad.budget.planning import make_plan
from slimgrad.budget.probe import as_it_was
from slimgrad.budget.process import resident_bytes
from slimgrad.budget.request import Request
from slimgrad.budget.size import parse_bytes
from slimgrad.bytelm.config import DEFAULT_OPTIMIZER, Method, TrainConfig
from slimgrad.bytelm.device import pick_device
from slimgrad.bytelm.gradient import add_gradient
from slimgrad.bytelm.loop import autocast, build_model
from slimgrad.bytelm.optimizer import moment_bytes
from slimgrad.call.arguments import DEFAULT_CHUNK, Options
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.data import Batch
from slimgrad.errors import InputError
from slimgrad.models.performer import Performer
from slimgrad.sweep.schedules.names import parse_schedule, schedule_as_text

PROBED = (256, 512)  # bytes of the sequences from which other methods' costs are extrapolated
PIECE_BYTES = 1 << 16  # of a text that is evaluated within a budget: read at once, and the largest chunk
_READ = 12  # bytes of memory for each of them: itself, joined with the byte before, and as int64 target
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
    if config.optimizer != DEFAULT_OPTIMIZER:
        reserved = {"optimiser": moment_bytes(config, model)}
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


def plan_evaluation(model: Performer, memory: str, num_bytes: int | None) -> Plan:
    """The plan of evaluating a sequence of so many bytes (None: nobody knows) within a budget, in pieces that are read.

    Its time is for `PIECE_BYTES`, or for all where that is less. Raises `InputError` as `plan_run` does.
    """
    length = PIECE_BYTES if num_bytes is None else max(2, min(num_bytes, PIECE_BYTES))
    options = Options(None, DEFAULT_CHUNK, None, cross_entropy_sum, "targets", None, None)
    reserved = {"text": _READ * length}
    return make_plan(
        Request(model, RandomBytes(1, length), None, options, head=True, differentiates=False, reserved=reserved),
        memory,
    )


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


def extrapolate(config: TrainConfig, model: Performer, length: int) -> dict[Method, Extrapolated]:
    """What one gradient of a run takes by the methods that hold the whole sequence.

    Bytes and seconds of two short sequences, and a straight line through them: with sums as state both are linear in
    the length. Live bytes are counted; the allocator's share is that of large blocks.
    """
    methods: tuple[Method, ...] = ("plain", "checkpoint")
    lengths = tuple(min(probed, max(2, length * probed // PROBED[-1])) for probed in PROBED)
    live: dict[Method, list[float]] = {method: [] for method in methods}
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    device = model.head.weight.device
    with as_it_was(model), autocast(config, model):
        for probed in lengths:
            batch = Batch(RandomBytes(config.batch, probed).read(0, probed))

            def work(method: Method, batch: Batch = batch) -> None:
                model.zero_grad()
                add_gradient(model, batch, method=method, chunk=1, schedule=None, normalizer=1.0)

            works = {method: functools.partial(work, method) for method in methods}
            taken = measure_in_turn(works, _TIMES, device.type)
            for method in methods:
                seconds[method].append(min(taken[method]))
                model.zero_grad()
                gc.collect()
                with LiveBytes() as counted:
                    work(method)
                live[method].append(counted.peak)
    model.zero_grad()
    found: dict[Method, Extrapolated] = {}
    for method in methods:
        num_bytes = _line(lengths, live[method], length)
        num_bytes += slack(device).of(num_bytes, 0)
        found[method] = Extrapolated(int(num_bytes), _line(lengths, seconds[method], length), lengths)
    return found


def _line(lengths: tuple[int, ...], values: list[float], length: int) -> float:
    """Through two points; through the second and nothing at length 0 where noise made the first larger."""
    (first, last), (low, high) = lengths, values
    slope = (high - low) / (last - first) if last > first else math.inf
    return high * length / last if not 0 < slope < math.inf else high + slope * (length - last)
