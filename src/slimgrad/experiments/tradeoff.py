"""Memory and time of one gradient against the chunk (paper, section 4.1): plain, layers computed twice, chunked.

A point is one gradient of a fresh model over random tokens in a process of its own. Beside each measured figure stands
a predicted one, in floats of 4 bytes per token of what lives at once, with s layers of width d, h heads, M features per
head and a vocabulary V:

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
import math
from time import perf_counter
from typing import Any

import torch

from slimgrad.data import Batch
from slimgrad.experiments.programme import Point, Row
from slimgrad.models import Performer, PerformerConfig, get_preset
from slimgrad.train.gradient import Method, add_gradient
from slimgrad.train.memory import PROC, proc_status

EXPERIMENT = "tradeoff"
CONFIGURATIONS = ("I", "II", "III", "IV")
FORMS = ("blocked", "iterative", "prefix_sum")
_SMALLEST_CHUNK = 16
_WARM_UP_TOKENS = 64
_SECONDS = {"I": 12.0, "II": 4.0, "III": 16.0, "IV": 60.0}
_QUICK = PerformerConfig(layers=2, width=64, heads=1)
_QUICK_LENGTH = 256


def tradeoff_points(*, quick: bool = False) -> list[Point]:
    """Every configuration, form, method and chunk from 16 to L; with `quick`, one small configuration."""
    points: list[Point] = []
    for name in ("small",) if quick else CONFIGURATIONS:
        config, length = (_QUICK, _QUICK_LENGTH) if quick else (get_preset(name).model, get_preset(name).length)
        chunks = [length >> i for i in range(round(math.log2(length / _SMALLEST_CHUNK)) + 1)]
        chunks = chunks[1 :: len(chunks) - 2] if quick else chunks
        for form in FORMS:
            model = dataclasses.asdict(dataclasses.replace(config, form=form))
            methods: list[tuple[str, int]] = [("plain", length), ("checkpoint", length)]
            for method, chunk in methods + [("chunked", chunk) for chunk in chunks]:
                words = f"{method} {chunk}" if method == "chunked" else method
                points.append(
                    Point(
                        experiment=EXPERIMENT,
                        name=f"{name} {form} {words}",
                        function="slimgrad.experiments.tradeoff:measure_cost",
                        task={"model": model, "length": length, "method": method, "chunk": chunk},
                        seconds=_SECONDS.get(name, 3.0),
                    )
                )
    return points


def measure_cost(*, model: dict[str, Any], length: int, method: Method, chunk: int) -> dict[str, Any]:
    """Peak resident bytes above parameters and gradients, and seconds, of one gradient of batch 1 (Linux).

    Returns:
        `peak_bytes` and `seconds`, or None for both and a `note` where the pass would not fit.
    """
    config = PerformerConfig(**model)
    predicted = predict_bytes(config, length, method, chunk)
    free = _available_bytes()
    if free is not None and predicted > 0.9 * free:
        note = f"needs about {predicted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return {"peak_bytes": None, "seconds": None, "note": note}
    torch.manual_seed(0)
    performer = Performer(config)
    few = min(_WARM_UP_TOKENS, length)
    _add(performer, few, method, few // 2)  # loads what torch loads lazily, and makes the gradients
    before = proc_status("VmRSS")
    if before is not None:
        (PROC / "clear_refs").write_text("5")
    performer.zero_grad(set_to_none=True)  # their bytes stay within `before`: the pass makes them anew
    began = perf_counter()
    _add(performer, length, method, chunk)
    seconds = perf_counter() - began
    after = proc_status("VmHWM")
    peak = None if before is None or after is None else max(after - before, 0)
    return {"peak_bytes": peak, "seconds": seconds, "note": ""}


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
    """Each point beside its prediction, and beside plain backpropagation of its configuration and form."""
    own = [row for row in rows if row["experiment"] == EXPERIMENT]
    plain = {tuple(row["name"].split()[:2]): row["result"] for row in own if row["task"]["method"] == "plain"}
    table: list[Row] = []
    for row in own:
        task, result = row["task"], row["result"]
        configuration, form = row["name"].split()[:2]
        config, how = PerformerConfig(**task["model"]), (task["length"], task["method"], task["chunk"])
        reference = plain.get((configuration, form), {})
        bytes_, seconds = result["peak_bytes"], result["seconds"]
        predicted, flops = predict_bytes(config, *how), predict_flops(config, *how)
        time_ratio = _ratio(seconds, reference.get("seconds"))
        table.append({
            "configuration": configuration, "form": form, "method": task["method"], "chunk": task["chunk"],
            "length": task["length"], "peak_mb": math.nan if bytes_ is None else bytes_ / 1e6,
            "predicted_mb": predicted / 1e6, "measured_over_predicted": _ratio(bytes_, predicted),
            "of_plain_memory": _ratio(bytes_, reference.get("peak_bytes")),
            "seconds": math.nan if seconds is None else seconds, "of_plain_time": time_ratio,
            "predicted_flops": flops, "time_over_flops": time_ratio / flops, "note": result["note"],
        })  # fmt: skip
    return table


def _ratio(value: float | None, reference: float | None) -> float:
    return math.nan if value is None or not reference else value / reference


def _add(model: Performer, length: int, method: Method, chunk: int) -> None:
    tokens = torch.randint(256, (1, length + 1), dtype=torch.uint8)
    batch = Batch(tokens[:, :-1], tokens[:, 1:].to(torch.int16))
    add_gradient(model, batch, method=method, chunk=chunk, schedule=None, normalizer=length)


def _available_bytes() -> int | None:
    try:
        lines = (PROC.parent / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
