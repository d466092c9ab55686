"""Memory and time of one gradient against the chunk (paper, section 4.1): plain, layers computed twice, chunked.

A memory point is one gradient of a fresh model over random tokens in a process of its own. A time point is a process
too: plain and several chunks in turn, round after round, so that what disturbs one disturbs all. Settings of glibc's
malloc (`measure.MALLOC`) are the process' environment. Beside each measured figure is a predicted one, in floats of
4 bytes per token of what lives at once, with s layers of width d, h heads, M features per head and a vocabulary V:

    a layer's graph      A = 17 d + h + 4 (blocked)    19 d + 3 h + 4 (iterative)    (19 + M) d + h + 4 (prefix sum)
    the last layer's way back      E = max(4 V + d, 5.5 d)    prefix sum: (3 M - 9) d, states per token
    plain                (s A + E) L
    layers twice         (4 d (s - 1) + A + E) L
    chunked              (s A + E) C, and 28 bytes per number of the state (accumulator, value, adjoint, new value)

A was counted at widths 64 to 512 and is exact for tensors; E is the larger of two moments, and approximate. FLOPs of
the matrix products against plain backpropagation's: 4/3 with layers computed twice; in N chunks
1 + (s - 1 + 1/6) / (3 s) * (N - 1) / N (no output head in the first sweep, and of the last layer its sums alone).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from typing import Any

import torch

from slimgrad.budget.measure import MALLOC, measure_in_turn
from slimgrad.bytelm.config import Method
from slimgrad.bytelm.memory import add_over_random_bytes, one_gradient
from slimgrad.bytelm.presets import get_preset
from slimgrad.models import Performer, PerformerConfig
from slimgrad.paper.machine import available_bytes
from slimgrad.paper.programme import Point, Row

EXPERIMENT = "tradeoff"
CONFIGURATIONS = ("I", "II", "III", "IV")
FORMS = ("blocked", "iterative", "prefix_sum")
_SMALLEST_CHUNK = 16
_SECONDS = {"I": 12.0, "II": 4.0, "III": 16.0, "IV": 60.0}  # of one gradient, on one core
_ROUNDS = 3
_TIMED_IV = (256, 4096)  # a gradient of IV takes a minute
_TIMED_OTHERWISE = (256,)  # in the other forms, where it takes up to four; plain prefix sums of IV want 28 GB
_QUICK = PerformerConfig(layers=2, width=64, heads=1)
_QUICK_LENGTH = 256


def tradeoff_points(*, quick: bool = False, device: str = "cpu") -> list[Point]:
    """Every configuration, form, method and chunk from 16 to L; with `quick`, one small configuration.

    Memory first: every form with freed blocks returned, then the blocked form by default malloc. Then time: every
    second power of two in the blocked form, one chunk in the others (IV: two, and in the blocked form alone); on CUDA
    every power in every form.

    Args:
        quick: see above.
        device: "cpu", or "cuda", where there is no malloc to set.
    """
    points: list[Point] = []
    names = ("small",) if quick else CONFIGURATIONS
    kinds = [("returned" if device == "cpu" else "default", form) for form in FORMS]
    if device == "cpu" and not quick:
        kinds.append(("default", FORMS[0]))
    for malloc, form in kinds:
        for name in names:
            config, length, chunks = _shape(name)
            model = dataclasses.asdict(dataclasses.replace(config, form=form))
            methods: list[tuple[str, int]] = [("plain", length), ("checkpoint", length)]
            for method, chunk in methods + [("chunked", chunk) for chunk in chunks]:
                words = f"{method} {chunk}" if method == "chunked" else method
                points.append(
                    Point(
                        experiment=EXPERIMENT,
                        name=f"{name} {form} {words} {malloc}",
                        labels={"configuration": name, "form": form, "malloc": malloc},
                        function=f"{__name__}:measure_cost",
                        task={"model": model, "length": length, "method": method, "chunk": chunk}
                        | ({"device": device} if device != "cpu" else {}),
                        seconds=_seconds(name, form, 3.0),
                        environment=MALLOC[malloc],
                    )
                )
    for form, name in itertools.product(FORMS[:1] if quick else FORMS, names):
        config, length, chunks = _shape(name)
        timed = _TIMED_IV if name == "IV" else tuple(c for c in chunks if math.log2(c) % 2 == 0)
        if device == "cuda":
            timed = tuple(chunks)
        elif form != FORMS[0]:
            if name == "IV":
                continue
            timed = _TIMED_OTHERWISE
        for malloc in ("default", "warm") if device == "cpu" else ("default",):
            model = dataclasses.asdict(dataclasses.replace(config, form=form))
            points.append(
                Point(
                    experiment=EXPERIMENT,
                    name=f"{name} {form} time {malloc}",
                    labels={"configuration": name, "form": form, "malloc": malloc},
                    function=f"{__name__}:measure_times",
                    task={"model": model, "length": length, "chunks": timed, "rounds": _ROUNDS, "device": device},
                    seconds=_seconds(name, form, 0.2) * (len(timed) + 2) * (_ROUNDS + 1),
                    environment=MALLOC[malloc],
                )
            )
    return points


def _seconds(name: str, form: str, quick: float) -> float:
    """Of one gradient on one core, roughly."""
    return _SECONDS.get(name, quick) * (4 if form == "prefix_sum" and name in _SECONDS else 1)


def _shape(name: str) -> tuple[PerformerConfig, int, list[int]]:
    """A configuration's model, its length and its chunks, longest first."""
    quick = name not in CONFIGURATIONS
    config, length = (_QUICK, _QUICK_LENGTH) if quick else (get_preset(name).model, get_preset(name).length)
    chunks = [length >> i for i in range(round(math.log2(length / _SMALLEST_CHUNK)) + 1)]
    return config, length, chunks[1 :: len(chunks) - 2] if quick else chunks


def measure_cost(
    *, model: dict[str, Any], length: int, method: Method, chunk: int, device: str = "cpu"
) -> dict[str, Any]:
    """Peak bytes above parameters and gradients, and seconds, of one gradient of batch 1.

    On the CPU resident bytes (Linux); on CUDA those that torch's allocator gave out.

    Returns:
        `peak_bytes` and `seconds`, or None for both and a `note` where the pass would not fit.
    """
    if note := too_large(PerformerConfig(**model), length, method, chunk, device):
        return {"peak_bytes": None, "seconds": None, "note": note}
    return one_gradient(model=model, length=length, method=method, chunk=chunk, device=device)


def measure_times(
    *, model: dict[str, Any], length: int, chunks: list[int], rounds: int, device: str = "cpu"
) -> dict[str, Any]:
    """Seconds of one gradient: plain, layers twice and each chunk, in turn, after a round that is not counted.

    Returns:
        `seconds`: by "plain", "checkpoint" and the chunk, a figure per round; empty, with a `note`, where plain
        backpropagation would not fit.
    """
    if note := too_large(PerformerConfig(**model), length, "plain", length, device):
        return {"seconds": {}, "note": note}
    torch.manual_seed(0)
    performer = Performer(PerformerConfig(**model)).to(device)
    methods: dict[str, tuple[Method, int]] = {"plain": ("plain", length), "checkpoint": ("checkpoint", length)}
    methods |= {str(chunk): ("chunked", chunk) for chunk in chunks}
    works = {name: functools.partial(add_over_random_bytes, performer, length, *how) for name, how in methods.items()}
    return {"seconds": measure_in_turn(works, rounds, device)}


def too_large(config: PerformerConfig, length: int, method: Method, chunk: int, device: str = "cpu") -> str:
    """What is lacking for a gradient; empty where it fits."""
    needed, free = predict_bytes(config, length, method, chunk), available_bytes(device)
    if needed <= 0.9 * free:
        return ""
    return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def predict_bytes(config: PerformerConfig, length: int, method: Method, chunk: int) -> float:
    """What the module's formula gives, in bytes."""
    s, d, h, m = config.layers, config.width, config.heads, config.num_features
    layer = {
        "iterative": 19 * d + 3 * h + 4,
        "prefix_sum": (19 + m) * d + h + 4,
    }.get(config.form, 17 * d + h + 4)
    last = max(4 * config.vocabulary + d, (3 * m - 9) * d if config.form == "prefix_sum" else 5.5 * d)
    if method == "checkpoint":
        return 4.0 * length * (4 * d * (s - 1) + layer + last)
    graph = 4.0 * (s * layer + last)
    if method == "plain":
        return graph * length
    return graph * min(chunk, length) + 3.5 * 8 * s * d * (m + 1)


def predict_flops(config: PerformerConfig, length: int, method: Method, chunk: int) -> float:
    """FLOPs of the matrix products over plain backpropagation's, by the module's formula."""
    if method != "chunked":
        return 4 / 3 if method == "checkpoint" else 1.0
    chunks, s = math.ceil(length / chunk), config.layers
    return 1 + (s - 1 + 1 / 6) / (3 * s) * (chunks - 1) / chunks


def compare_costs(rows: list[Row]) -> list[Row]:
    """Each memory point beside its prediction, and beside plain backpropagation of its configuration and form."""
    own = [row for row in rows if row["experiment"] == EXPERIMENT and "method" in row["task"]]
    plain = {_kind(row): row["result"] for row in own if row["task"]["method"] == "plain"}
    table: list[Row] = []
    for row in own:
        task, result = row["task"], row["result"]
        configuration, form, malloc = _kind(row)
        config, how = PerformerConfig(**task["model"]), (task["length"], task["method"], task["chunk"])
        bytes_, predicted = result["peak_bytes"], predict_bytes(config, *how)
        table.append({
            "configuration": configuration, "form": form, "malloc": malloc, "method": task["method"],
            "chunk": task["chunk"], "length": task["length"], "peak_mb": math.nan if bytes_ is None else bytes_ / 1e6,
            "predicted_mb": predicted / 1e6, "measured_over_predicted": _ratio(bytes_, predicted),
            "of_plain_memory": _ratio(bytes_, plain.get(_kind(row), {}).get("peak_bytes")),
            "seconds": math.nan if result["seconds"] is None else result["seconds"], "note": result["note"],
        })  # fmt: skip
    return table


def compare_times(rows: list[Row]) -> list[Row]:
    """Each method of the time points over plain's time in the same round, beside the FLOPs predicted."""
    table: list[Row] = []
    for row in rows:
        if row["experiment"] != EXPERIMENT or "rounds" not in row["task"]:
            continue
        (configuration, form, malloc), task, measured = _kind(row), row["task"], row["result"]["seconds"]
        config, length = PerformerConfig(**task["model"]), task["length"]
        ways: list[tuple[str, Method, int]] = [("plain", "plain", length), ("checkpoint", "checkpoint", length)]
        for chunk in task["chunks"]:
            ways.append((str(chunk), "chunked", chunk))
        for name, method, chunk in ways:
            if name not in measured:  # none is, where plain backpropagation would not fit
                continue
            seconds = measured[name]
            ratios = [ours / plain for ours, plain in zip(seconds, measured["plain"], strict=True)]
            flops = predict_flops(config, length, method, chunk)
            table.append({
                "configuration": configuration, "form": form, "malloc": malloc, "method": method,
                "chunk": chunk, "length": length, "rounds": task["rounds"],
                "seconds": statistics.median(seconds), "of_plain_time": statistics.median(ratios),
                "least": min(ratios), "most": max(ratios), "predicted_flops": flops,
                "time_over_flops": statistics.median(ratios) / flops,
            })  # fmt: skip
    return table


def _kind(row: Row) -> tuple[str, str, str]:
    """Configuration, form and setting of malloc."""
    labels = row["labels"]
    return labels["configuration"], labels["form"], labels["malloc"]


def _ratio(value: float | None, reference: float | None) -> float:
    return math.nan if value is None or not reference else value / reference
