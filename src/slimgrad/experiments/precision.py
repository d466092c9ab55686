"""How exact the chunked gradient is in finite precision (paper, experiment b): over the chunk, and over the length.

Everything is held against one float64 gradient, so that a method's error stands beside the error that float32 makes by
itself, in plain backpropagation. The error is || g - truth || / || truth || over all parameters together.

| way | the state going back | gradients |
|---|---|---|
| plain | none: one graph | one product over all tokens |
| subtracted, float32 | `B -= delta` in float32, as published | added up in float32 |
| subtracted, float64 | the same in float64 | added up in float32 |
| slimgrad | fixed point, bit for bit | as `sg.backward` gathers them |

Subtraction loses what the addition rounded away, once per chunk, and carries the loss on to all chunks before. What
is left before the first chunk, where the state should be zero, over the state after that chunk, is the drift: how wrong
the state is that the earliest chunks are rebuilt from.
"""

from __future__ import annotations

import math
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slimgrad.api import backward
from slimgrad.data import load_corpus
from slimgrad.experiments.programme import Point, Row
from slimgrad.experiments.regimes import train_regime
from slimgrad.losses import cross_entropy_sum
from slimgrad.models import Performer, PerformerConfig
from slimgrad.sweep.state import PrefixSum
from slimgrad.train import TrainConfig, open_model

EXPERIMENT = "precision"
WEIGHTS = ("fresh", "trained")
CHUNK = 256  # where the length changes
LENGTH = 16_384  # where the chunk changes
STRETCHES = 8  # of text, up to `LENGTH` tokens: how rounding falls differs from one to the next by some percent
_MODEL = PerformerConfig(layers=2, width=32, heads=1)
_TRAINED = "runs/precision"
_TRUTH_IN_ONE_GRAPH = 131_072  # tokens; beyond it the truth is slimgrad's own in float64, and is compared up to there
_Dtype = Literal["float32", "float64"]


def precision_points(*, quick: bool = False) -> list[Point]:
    """A short training run; before and after it, every length in chunks of `CHUNK`, and one length in every chunk."""
    lengths = (1024, 4096) if quick else tuple(1 << i for i in range(10, 21, 2))
    chunks = (64, 1024) if quick else tuple(1 << i for i in range(4, 14))
    steps = 20 if quick else 400
    training = TrainConfig(
        model=_MODEL, length=1024, steps=steps, chunk=1024, learning_rate=3e-3, eval_every=steps, save_every=steps
    )
    points = [
        Point(
            experiment=EXPERIMENT,
            name="training",
            function=f"{train_regime.__module__}:{train_regime.__name__}",
            task={"folder": _TRAINED, "config": training.to_dict()},
            seconds=0.05 * steps,
        )
    ]
    for weights in WEIGHTS:
        sizes = [
            (length, stretch, [CHUNK])
            for length in lengths
            for stretch in range(STRETCHES if length <= LENGTH and not quick else 1)
        ]
        points += [
            Point(
                experiment=EXPERIMENT,
                name=f"{weights} {'chunks' if len(of) > 1 else 'lengths'} {length}" + f" at {stretch}" * bool(stretch),
                function=f"{__name__}:measure_precision",
                task={"run": _TRAINED if weights == "trained" else None, "length": length, "chunks": of}
                | ({"stretch": stretch} if stretch else {}),
                seconds=2 + length * (1 + len(of)) / 6000,
            )
            for length, stretch, of in [*sizes, (lengths[-1] if quick else LENGTH, 0, list(chunks))]
        ]
    points += [
        Point(
            experiment=EXPERIMENT,
            name=f"fresh drift {length}",
            function=f"{__name__}:measure_drift",
            task={"length": length, "chunk": CHUNK},
            seconds=2 + length / 8000,
        )
        for length in lengths
    ]
    return points


def measure_precision(*, run: str | None, length: int, chunks: list[int], stretch: int = 0) -> dict[str, Any]:
    """Errors of one gradient over `length` bytes of text that Python carries, repeated where it is too short.

    Args:
        run: the folder of the run whose model it is; None: a fresh model.
        length: tokens.
        chunks: for the ways that have one.
        stretch: which of `STRETCHES`, spread evenly over the text.

    Returns:
        `plain`: its error; `ways`: by name and chunk, theirs; `truth_off`: how far slimgrad in float64 is from plain
        backpropagation in float64 (None: it is the truth itself here).
    """
    tokens = _tokens(length, stretch)
    model = _fresh() if run is None else open_model(Path(run))[0]
    wide = _fresh().double()
    wide.load_state_dict(model.state_dict())
    truth = chunked(wide, tokens, max(chunks))
    truth_off = None
    if length <= _TRUTH_IN_ONE_GRAPH:
        swept, truth = truth, plain(wide, tokens)
        truth_off = error(swept, truth)
    ways: dict[str, dict[str, float]] = {"subtracted, float32": {}, "subtracted, float64": {}, "slimgrad": {}}
    for chunk in chunks:
        for name, dtype in (("subtracted, float32", torch.float32), ("subtracted, float64", torch.float64)):
            ways[name][str(chunk)] = error(subtracted(model, tokens, chunk, dtype), truth)
        ways["slimgrad"][str(chunk)] = error(chunked(model, tokens, chunk), truth)
    return {"plain": error(plain(model, tokens), truth), "ways": ways, "truth_off": truth_off}


def measure_drift(*, length: int, chunk: int) -> dict[str, Any]:
    """Drift by way: || state rolled back to the beginning || / || state after one chunk ||, all sums together.

    slimgrad compares every rebuilt state with the first sweep's in every bit and raises where they differ: that it
    came through is what its zero stands for.
    """
    model, tokens = _fresh(), _tokens(length)
    chunked(model, tokens, chunk)
    drift = {"slimgrad": 0.0}
    for name, dtype in (("subtracted, float32", torch.float32), ("subtracted, float64", torch.float64)):
        drift[name] = _sweep_subtracting(model, tokens, chunk, dtype)
    model.zero_grad(set_to_none=True)
    return {"drift": drift}


def plain(model: Performer, tokens: Tensor) -> list[Tensor]:
    """One graph over the whole sequence."""
    model.zero_grad(set_to_none=True)
    outputs, _ = model(tokens[:, :-1], model.initial_state(1))
    (cross_entropy_sum(outputs, tokens[:, 1:].long()) / (tokens.shape[1] - 1)).backward()
    return _taken(model)


def chunked(model: Performer, tokens: Tensor, chunk: int) -> list[Tensor]:
    """As the library computes it."""
    model.zero_grad(set_to_none=True)
    backward(model, tokens[:, :-1], tokens[:, 1:].long(), chunk=chunk)
    return _taken(model)


class _Subtracted:
    """A sum as the published code carries it: it goes back by subtracting what it had added."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.zeros_like(like, dtype=dtype)
        self.back = self.first = False
        self.left = 0.0  # of the sum before the first chunk, which should be zero
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self.adjoint: Tensor | None = None

    def advance(self, delta: Tensor) -> tuple[Tensor, PrefixSum]:
        change = delta.detach().to(self.total.dtype)
        if not self.back:
            before, self.total = self.total.to(delta.dtype), self.total + change
            return before, PrefixSum(self.total.to(delta.dtype))
        self.total = self.total - change
        if self.first:  # zeros, as published
            self.left, self.total = float(self.total.norm()), torch.zeros_like(self.total)
        self.before = self.total.detach().to(delta.dtype).requires_grad_(delta.requires_grad)
        self.after = self.before + delta
        return self.before, PrefixSum(self.after)


def subtracted(model: Performer, tokens: Tensor, chunk: int, dtype: torch.dtype) -> list[Tensor]:
    """Algorithm 1 as published: sums that are rolled back by subtraction, in `dtype`."""
    model.zero_grad(set_to_none=True)
    _sweep_subtracting(model, tokens, chunk, dtype)
    return _taken(model)


def _sweep_subtracting(model: Performer, tokens: Tensor, chunk: int, dtype: torch.dtype) -> float:
    """Both sweeps: gradients are added to `.grad`; returns the drift."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].long()
    start = model.initial_state(1)
    sums = [tuple(_Subtracted(one.value, dtype) for one in layer) for layer in start["layers"]]
    flat = [one for layer in sums for one in layer]
    begins = range(0, inputs.shape[1], chunk)
    one_chunk = 0.0
    for back in (False, True):
        for one in flat:
            one.back = back
        for begin in reversed(begins) if back else begins:
            state = {
                "layers": [tuple(PrefixSum(one.total, _link=one) for one in layer) for layer in sums],
                "position": PrefixSum(torch.tensor(begin)),
            }
            with nullcontext() if back else torch.no_grad():
                if not back:
                    model.advance(inputs[:, begin : begin + chunk], state)
                    one_chunk = one_chunk or math.hypot(*(float(one.total.norm()) for one in flat))
                    continue
                for one in flat:
                    one.first = begin == 0
                outputs, _ = model(inputs[:, begin : begin + chunk], state)
                loss = cross_entropy_sum(outputs, targets[:, begin : begin + chunk]) / inputs.shape[1]
                roots = [(one.after, one.adjoint) for one in flat if one.after is not None and one.adjoint is not None]
                torch.autograd.backward([loss, *(after for after, _ in roots)], [None, *(g for _, g in roots)])
            for one in flat:
                one.adjoint = None if one.before is None else one.before.grad
    return math.hypot(*(one.left for one in flat)) / one_chunk


def error(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """|| gradients - truth || / || truth ||, all parameters together."""
    off = sum(float((g.double() - t).square().sum()) for g, t in zip(gradients, truth, strict=True))
    return math.sqrt(off / sum(float(t.square().sum()) for t in truth))


def compare_precision(rows: list[Row]) -> list[Row]:
    """A line per weights, length, chunk and way: errors as means over the stretches, plain float32's own beside them.

    The ratio is that of the means; `least` and `most` are of single stretches.
    """
    found: dict[tuple[str, str, int, str, int], list[tuple[float, float]]] = {}
    for row in rows:
        if row["experiment"] != EXPERIMENT or "chunks" not in row["task"]:
            continue
        weights, over = row["name"].split()[:2]
        for way, errors in row["result"]["ways"].items():
            for chunk, error in errors.items():
                key = (weights, over, row["task"]["length"], way, int(chunk))
                found.setdefault(key, []).append((error, row["result"]["plain"]))
    table: list[Row] = []
    for (weights, over, length, way, chunk), pairs in found.items():
        own, plains = (statistics.mean(values) for values in zip(*pairs, strict=True))
        ratios = [error / plain for error, plain in pairs]
        table.append({
            "weights": weights, "over": over, "length": length, "chunk": chunk, "way": way, "stretches": len(pairs),
            "error": own, "plain_float32": plains, "of_plain_float32": own / plains, "least": min(ratios),
            "most": max(ratios),
        })  # fmt: skip
    return table


def compare_drift(rows: list[Row]) -> list[Row]:
    """A line per length and way."""
    return [
        {
            "length": row["task"]["length"],
            "chunks": math.ceil(row["task"]["length"] / row["task"]["chunk"]),
            "way": way,
            "drift": drift,
        }
        for row in rows
        if row["experiment"] == EXPERIMENT and "drift" in row["result"]
        for way, drift in row["result"]["drift"].items()
    ]


def _tokens(length: int, stretch: int = 0) -> Tensor:
    """Text that Python carries, from one of its stretches on, repeated where it is too short, `[1, length + 1]`."""
    text = load_corpus().text
    few = min(length + 1, len(text))
    begin = (len(text) - few) * stretch // (STRETCHES - 1)
    piece = text.read(begin, begin + few)
    return piece.repeat(math.ceil((length + 1) / few))[: length + 1][None]


def _fresh() -> Performer:
    torch.manual_seed(0)
    return Performer(_MODEL)


def _taken(model: Performer) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients
