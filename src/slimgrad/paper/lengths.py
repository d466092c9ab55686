"""Memory against length, to a million tokens, for each kind of state; and what each schedule costs.

A length is one gradient in a process of its own, with freed blocks returned ("mapped" in `measure.MALLOC`). Sums, gates
and a window hold a state whose size the length does not move. A cache of keys and values grows, so its memory is
linear in chunks too; in one graph it is quadratic here, because the mask of attention is. Time is quadratic either
way, so it stops earlier.

Schedules are compared on one model with a large state (a head of width 128: 16,512 numbers), in 256 chunks.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimgrad.api import backward
from slimgrad.budget.measure import MALLOC, measure_in_turn, measure_peak
from slimgrad.models import Cached, Gated, Performer, PerformerConfig, Windowed
from slimgrad.paper.machine import available_bytes
from slimgrad.paper.programme import Point, Row
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.binomial import Binomial
from slimgrad.sweep.schedules.every import Every
from slimgrad.sweep.schedules.keep import Keep, Rebuild
from slimgrad.verification.reference import plain_backward

LENGTHS, SCHEDULES = "lengths", "schedules"
KINDS: dict[str, Callable[[], nn.Module]] = {
    "sums": lambda: Performer(PerformerConfig(layers=1, width=32, heads=1)), "gates": Gated, "window": Windowed,
    "cache": Cached,
}  # fmt: skip
VOCABULARY = 256
_CHUNK = 1024
_LONGEST = {"cache": 1 << 16}  # tokens; its time is quadratic
_LONGEST_PLAIN = {"cache": 1 << 14}  # one graph's mask of attention is quadratic too
_PLAIN_BYTES, _MASK_BYTES = 12e3, 15.0  # in one graph, at most: per token (gates); per pair of tokens (a cache)
_SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "Rebuild()": Rebuild, "Keep()": Keep, "Every(16)": lambda: Every(16), "Binomial(8)": lambda: Binomial(8),
    "Binomial(4)": lambda: Binomial(4),
}  # fmt: skip
_SCHEDULED = PerformerConfig(layers=1, width=128, heads=1)
_SCHEDULED_CHUNK, _ROUNDS = 256, 3
_FEW = 64  # tokens that warm up


def length_points(*, quick: bool = False) -> list[Point]:
    """Each kind of state at every length, plain where it fits, and in chunks of 1,024."""
    lengths = (8192,) if quick else tuple(4096 << i for i in range(0, 9, 2))
    points: list[Point] = []
    for kind, length, method in itertools.product(KINDS, lengths, ("plain", "chunked")):
        longest = (_LONGEST if method == "chunked" else _LONGEST_PLAIN).get(kind, 1 << 20)
        if length <= longest and (method == "chunked" or length <= 1 << 16):
            points.append(
                Point(
                    experiment=LENGTHS,
                    name=f"{kind} {method} {length}",
                    function=f"{__name__}:measure_length",
                    task={"kind": kind, "length": length, "method": method, "chunk": _CHUNK},
                    seconds=3 + length * (1 + length / 1e4 if kind == "cache" else 1) / 1e4,
                    environment=MALLOC["mapped"],
                )
            )
    return points


def schedule_points(*, quick: bool = False) -> list[Point]:
    """Peak memory of each schedule in a process of its own, and the time of all in turn."""
    length = (16 if quick else 256) * _SCHEDULED_CHUNK
    points = [
        Point(
            experiment=SCHEDULES,
            name=f"{schedule} memory",
            function=f"{__name__}:measure_schedule",
            task={"schedule": schedule, "length": length},
            seconds=3 + length / 6000,
            environment=MALLOC["mapped"],
        )
        for schedule in _SCHEDULES
    ]
    task = {"length": length, "rounds": _ROUNDS}
    seconds = len(_SCHEDULES) * (_ROUNDS + 1) * length / 6000
    name = f"{__name__}:measure_schedules"
    return [*points, Point(experiment=SCHEDULES, name="all time", function=name, task=task, seconds=3 + seconds)]


def measure_length(*, kind: str, length: int, method: Literal["plain", "chunked"], chunk: int) -> dict[str, Any]:
    """`peak_bytes` above parameters and gradients, and `seconds`; None and a `note` where it would not fit."""
    free = available_bytes()
    needed = length * (_MASK_BYTES * length if kind == "cache" else _PLAIN_BYTES)
    if method == "plain" and needed > 0.9 * free:
        note = f"needs up to {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return {"peak_bytes": None, "seconds": None, "note": note}
    torch.manual_seed(0)
    model = KINDS[kind]()
    tokens = _tokens(length)

    def add(tokens: Tensor, chunk: int = chunk) -> None:
        model.zero_grad(set_to_none=True)
        if method == "chunked":
            backward(model, tokens, chunk=chunk)
        else:
            plain_backward(model, tokens[:, :-1], tokens[:, 1:])

    add(tokens[:, :_FEW], _FEW // 2)  # loads what is loaded lazily, and makes the gradients
    return measure_peak(lambda: add(tokens))._asdict() | {"note": ""}


def measure_schedule(*, schedule: str, length: int) -> dict[str, Any]:
    """`peak_bytes` above parameters and gradients, of one gradient under a schedule."""
    model, tokens = _scheduled(), _tokens(length)
    _add_scheduled(model, tokens[:, :_FEW], schedule)
    return measure_peak(lambda: _add_scheduled(model, tokens, schedule))._asdict()


def measure_schedules(*, length: int, rounds: int) -> dict[str, Any]:
    """`seconds` of each schedule in turn, and whether all gave Rebuild's gradient in every bit (`same`)."""
    model, tokens = _scheduled(), _tokens(length)
    gradients: dict[str, list[Tensor]] = {}

    def work(schedule: str) -> Callable[[], None]:
        def add() -> None:
            _add_scheduled(model, tokens, schedule)
            gradients[schedule] = [p.grad for p in model.parameters() if p.grad is not None]

        return add

    seconds = measure_in_turn({name: work(name) for name in _SCHEDULES}, rounds)
    first = gradients["Rebuild()"]
    same = {name: all(map(torch.equal, found, first)) for name, found in gradients.items()}
    return {"seconds": seconds, "same": same}


def compare_lengths(rows: list[Row]) -> list[Row]:
    """A line per kind, way and length."""
    return [
        {
            "state": row["task"]["kind"], "method": row["task"]["method"], "length": row["task"]["length"],
            "chunk": row["task"]["chunk"] if row["task"]["method"] == "chunked" else row["task"]["length"],
            "peak_mb": math.nan if row["result"]["peak_bytes"] is None else row["result"]["peak_bytes"] / 1e6,
            "seconds": math.nan if row["result"]["seconds"] is None else row["result"]["seconds"],
            "note": row["result"]["note"],
        }
        for row in rows
        if row["experiment"] == LENGTHS
    ]  # fmt: skip


def compare_schedules(rows: list[Row]) -> list[Row]:
    """A line per schedule: peak memory, and time over Rebuild's in the same round."""
    own = [row for row in rows if row["experiment"] == SCHEDULES]
    timed = next((row for row in own if "rounds" in row["task"]), None)
    peaks = {row["task"]["schedule"]: row for row in own if "schedule" in row["task"]}
    table: list[Row] = []
    for schedule in _SCHEDULES:
        peak = peaks.get(schedule)
        if peak is None or timed is None:
            continue
        seconds, first = timed["result"]["seconds"][schedule], timed["result"]["seconds"]["Rebuild()"]
        bytes_ = peak["result"]["peak_bytes"]
        table.append({
            "schedule": schedule, "chunks": timed["task"]["length"] // _SCHEDULED_CHUNK,
            "peak_mb": math.nan if bytes_ is None else bytes_ / 1e6, "seconds": statistics.median(seconds),
            "over_rebuild": statistics.median(a / b for a, b in zip(seconds, first, strict=True)),
            "same_bits": timed["result"]["same"][schedule],
        })  # fmt: skip
    return table


def _add_scheduled(model: Performer, tokens: Tensor, schedule: str) -> None:
    model.zero_grad(set_to_none=True)
    backward(model, tokens, chunk=_SCHEDULED_CHUNK, schedule=_SCHEDULES[schedule]())


def _scheduled() -> Performer:
    torch.manual_seed(0)
    return Performer(_SCHEDULED)


def _tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
