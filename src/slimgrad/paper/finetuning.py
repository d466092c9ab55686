"""Fine-tuning on a small device (paper, experiment d): one step on what was read, and the next half is read better.

A trained model reads a random stretch of validation text. One step of gradient descent on the loss of the first half,
then bits per byte on the second half (which follows in the same sequence), beside those without the step. 5,000
stretches at one chunk; 250 at each other one, where every gradient is also held against plain backpropagation's.

The published rate is 0.01. What a step is worth depends on it and on how far the model was trained, so smaller rates
stand beside it, over 250 stretches. They were chosen after a look: 0.003 and 0.001 at the first eight stretches of a
model that had a twentieth of its training, the others when 0.001 had hurt one that had two fifths.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from slimgrad.api import backward, evaluate
from slimgrad.budget.measure import MALLOC
from slimgrad.bytelm import TrainConfig, split_corpus
from slimgrad.bytelm.config import Method
from slimgrad.bytelm.gradient import add_gradient
from slimgrad.data import Batch
from slimgrad.models import Performer
from slimgrad.paper.compatibility import EXPERIMENT as COMPATIBILITY
from slimgrad.paper.compatibility import compare
from slimgrad.paper.precision import error, take_gradients
from slimgrad.paper.programme import Point, Row
from slimgrad.paper.regimes import load_text, open_finished

EXPERIMENT = "finetuning"
RATES = (0.01, 0.003, 0.001, 0.0003, 0.0001)  # the first is the published one
_STRETCHES, _OTHERS = 5000, 250
_CONFIDENCE = 1.96  # standard errors on each side of a mean: 95 %


def finetuning_points(
    name: str,
    run: str,
    config: TrainConfig,
    *,
    corpus: str | None,
    seconds: float,
    quick: bool = False,
    device: str = "cpu",
) -> list[Point]:
    """The points for one trained model, in pieces of 250 stretches, and its memory at every chunk.

    Args:
        name: what the model is called.
        run: the folder of its run, within the programme's.
        config: the run's configuration.
        corpus: what it was trained on, for `load_corpus`.
        seconds: of one stretch, roughly.
        quick: few stretches.
        device: "cpu" or "cuda".
    """
    half = config.length // 2
    where = {"device": device} if device != "cpu" else {}
    chunks = [half >> i for i in ((1, 3) if quick else (1, 2, 3, 5))]  # the first is the one with many stretches
    stretches, piece = (8, 4) if quick else (_STRETCHES, _OTHERS)
    points: list[Point] = []

    def add(chunk: int, rate: float, first: int, *, compared: bool) -> None:
        task: Row = {
            "run": run, "chunk": chunk, "rate": rate, "first": first, "count": piece, "compared": compared,
        }  # fmt: skip
        points.append(
            Point(
                experiment=EXPERIMENT,
                name=f"{name} {chunk} rate {rate} from {first}",
                labels={"model": name},
                function=f"{__name__}:adapt",
                task=task | ({"corpus": corpus} if corpus else {}) | where,
                seconds=seconds * piece * (1.6 if compared else 1),
                needs=config.to_dict(),
            )
        )

    for chunk in chunks:
        add(chunk, RATES[0], 0, compared=True)
    for rate in RATES[1:]:
        add(chunks[0], rate, 0, compared=False)
    for first in range(piece, stretches, piece):
        add(chunks[0], RATES[0], first, compared=False)
    model = dataclasses.asdict(config.model)
    methods: list[tuple[Method, int]] = [("plain", half), *(("chunked", chunk) for chunk in chunks)]
    for method, chunk in methods:
        points.append(
            Point(
                experiment=EXPERIMENT,
                name=f"{name} {chunk} memory {method}",
                labels={"model": name},
                function="slimgrad.paper.tradeoff:measure_cost",
                task={"model": model, "length": half, "method": method, "chunk": chunk} | where,
                seconds=4.0,
                environment=MALLOC["returned" if device == "cpu" else "default"],
            )
        )
    return points


def adapt(
    *,
    run: str,
    chunk: int,
    rate: float,
    first: int,
    count: int,
    compared: bool,
    corpus: str | None = None,
    data_dir: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Adapt the model to stretches `first` to `first + count`, each anew from the trained weights.

    Returns:
        `before` and `after`: bits per byte of each stretch's second half; `difference`: the largest of
        || g - plain g || / || plain g ||, None where `compared` is False.
    """
    model, config = open_finished(run)
    model.to(device)
    text = load_text(corpus, data_dir)
    validation = split_corpus(config, text, window=config.length).validation
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(validation) - config.length, (first + count,), generator=generator)[first:].tolist()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    before: list[float] = []
    after: list[float] = []
    differences: list[float] = []
    half = config.length // 2
    for start in starts:
        tokens = validation.read(start, start + config.length + 1)[None].to(device)
        first_half, targets = tokens[:, :half], tokens[:, 1 : half + 1].long()
        model.zero_grad(set_to_none=True)
        state = backward(model, first_half, targets, chunk=chunk).final_state
        before.append(_second_half_bits(model, tokens, chunk, state))
        gradients = take_gradients(model)
        if compared:
            add_gradient(model, Batch(first_half, targets), method="plain", chunk=half, schedule=None, normalizer=half)
            differences.append(error(gradients, [g.double() for g in take_gradients(model)]))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
            state = evaluate(model, first_half, targets, chunk=chunk).final_state
            after.append(_second_half_bits(model, tokens, chunk, state))
            for parameter, trained in zip(model.parameters(), weights, strict=True):
                parameter.copy_(trained)
    return {"before": before, "after": after, "difference": max(differences) if differences else None}


def compare_finetuning(rows: list[Row]) -> list[Row]:
    """A line per model, chunk and rate: bits without and with the step, what it helps with 95 % confidence, and memory.

    `trained` is the share of the published steps that the model had; NaN where its run is not one of (c)'s.
    """
    own = [row for row in rows if row["experiment"] == EXPERIMENT]
    shares = {run["task"]: run["share"] for run in compare([row for row in rows if row["experiment"] == COMPATIBILITY])}
    measured = [(r["labels"]["model"], r["task"], r["result"]["peak_bytes"]) for r in own if "method" in r["task"]]
    peaks = {(model, task["chunk"]): peak for model, task, peak in measured if task["method"] == "chunked"}
    plain = {model: peak for model, task, peak in measured if task["method"] == "plain"}
    pieces: dict[tuple[str, int, float], list[Row]] = {}
    for row in own:
        if "first" in row["task"]:
            key = (row["labels"]["model"], row["task"]["chunk"], row["task"]["rate"])
            pieces.setdefault(key, []).append(row["result"])
    table: list[Row] = []
    for (name, chunk, rate), results in pieces.items():
        before = [bits for result in results for bits in result["before"]]
        after = [bits for result in results for bits in result["after"]]
        gains = [b - a for b, a in zip(before, after, strict=True)]
        found = [result["difference"] for result in results if result["difference"] is not None]
        peak, peak_plain = peaks.get((name, chunk)), plain.get(name)
        table.append({
            "model": name, "trained": shares.get(name, math.nan), "chunk": chunk, "rate": rate,
            "stretches": len(gains), "bits_without": statistics.mean(before), "bits_with": statistics.mean(after),
            "gain": statistics.mean(gains),
            "gain_confidence": _CONFIDENCE * statistics.stdev(gains) / math.sqrt(len(gains)),
            "helped": sum(gain > 0 for gain in gains) / len(gains),
            "largest_gradient_difference": max(found) if found else math.nan,
            "peak_mb": math.nan if peak is None else peak / 1e6,
            "plain_peak_mb": math.nan if peak_plain is None else peak_plain / 1e6,
        })  # fmt: skip
    return table


def _second_half_bits(model: Performer, tokens: Tensor, chunk: int, state: Any) -> float:
    """Bits per byte, from the state after the first half."""
    half = tokens.shape[1] // 2
    inputs, targets = tokens[:, half:-1], tokens[:, half + 1 :].long()
    return float(evaluate(model, inputs, targets, chunk=chunk, state=state).loss) / math.log(2)
