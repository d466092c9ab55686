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

import functools
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from slimgrad.api import backward
from slimgrad.bytelm import TrainConfig
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.data import END, load_corpus
from slimgrad.models import Performer, PerformerConfig
from slimgrad.paper.programme import Point, Row
from slimgrad.paper.regimes import open_finished, train_regime
from slimgrad.paper.tradeoff import too_large
from slimgrad.states.accumulator import Accumulator
from slimgrad.states.sums import PrefixSum
from slimgrad.verification.reference import plain_backward

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
        model=_MODEL, length=1024, steps=steps, chunk=1024, learning_rate=3e-3, eval_every=steps, save_every=steps,
        validation=END,  # as when the committed rows were measured
    )  # fmt: skip
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
            ("lengths", length, stretch, [CHUNK])
            for length in lengths
            for stretch in range(STRETCHES if length <= LENGTH and not quick else 1)
        ]
        points += [
            Point(
                experiment=EXPERIMENT,
                name=f"{weights} {over} {length}" + f" at {stretch}" * bool(stretch),
                labels={"weights": weights, "over": over},
                function=f"{__name__}:measure_precision",
                task={"run": _TRAINED if weights == "trained" else None, "length": length, "chunks": of}
                | ({"stretch": stretch} if stretch else {}),
                seconds=2 + length * (1 + len(of)) / 6000,
                needs=training.to_dict() if weights == "trained" else None,
            )
            for over, length, stretch, of in [*sizes, ("chunks", lengths[-1] if quick else LENGTH, 0, list(chunks))]
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
        `plain`: its error (None where its graph would not fit); `ways`: by name and chunk, theirs; `truth_off`: how far
        slimgrad in float64 is from plain backpropagation in float64 (None: it is the truth itself here).
    """
    tokens = _tokens(length, stretch)
    model = _fresh() if run is None else open_finished(run)[0]
    wide = _fresh().double()
    wide.load_state_dict(model.state_dict())
    truth = chunked(wide, tokens, max(chunks))
    truth_off = None
    if length <= _TRUTH_IN_ONE_GRAPH:
        swept, truth = truth, plain(wide, tokens)
        truth_off = error(swept, truth)
    ways: dict[str, dict[str, float]] = {way: {} for way in (*_SUBTRACTED, "slimgrad")}
    for chunk in chunks:
        for way in _SUBTRACTED:
            ways[way][str(chunk)] = error(subtracted(model, tokens, chunk, way), truth)
        ways["slimgrad"][str(chunk)] = error(chunked(model, tokens, chunk), truth)
    fits = not too_large(model.config, length, "plain", length)
    return {"plain": error(plain(model, tokens), truth) if fits else None, "ways": ways, "truth_off": truth_off}


def measure_drift(*, length: int, chunk: int) -> dict[str, Any]:
    """Drift by way: || state rolled back to the beginning || / || state after one chunk ||, all sums together.

    slimgrad's is that of its accumulators, put in the place of the published sums.
    """
    model, tokens = _fresh(), _tokens(length)
    drift: dict[str, float] = {}
    for way, make in {**_SUBTRACTED, "slimgrad": _Accumulated}.items():
        drift[way] = _sweep_subtracting(model, tokens, chunk, make)
        model.zero_grad(set_to_none=True)
    return {"drift": drift}


def plain(model: Performer, tokens: Tensor) -> list[Tensor]:
    """One graph over the whole sequence."""
    model.zero_grad(set_to_none=True)
    plain_backward(model, tokens[:, :-1], tokens[:, 1:])
    return take_gradients(model)


def chunked(model: Performer, tokens: Tensor, chunk: int) -> list[Tensor]:
    """As the library computes it."""
    model.zero_grad(set_to_none=True)
    backward(model, tokens[:, :-1], tokens[:, 1:].long(), chunk=chunk)
    return take_gradients(model)


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
        change = delta.detach()
        if not self.back:
            before = self.total.to(delta.dtype)
            self.add(change)
            return before, PrefixSum(self.total.to(delta.dtype))
        self.left = self.subtract(change)
        if self.first:  # zeros, as published
            self.total = torch.zeros_like(self.total)
        self.before = self.total.detach().to(delta.dtype).requires_grad_(delta.requires_grad)
        self.after = self.before + delta
        return self.before, PrefixSum(self.after)

    def add(self, change: Tensor) -> None:
        self.total = self.total + change.to(self.total.dtype)

    def subtract(self, change: Tensor) -> float:
        """Go back, and return the length of what is left."""
        self.total = self.total - change.to(self.total.dtype)
        return float(self.total.norm())


class _Accumulated(_Subtracted):
    """The same with slimgrad's accumulator as the sum."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like, like.dtype)
        self._sum = Accumulator(self.total)

    def add(self, change: Tensor) -> None:
        self._sum.add(change)
        self.total = self._sum.value()
        self._sum.done(log=True)

    def subtract(self, change: Tensor) -> float:
        self._sum.subtract(change)
        self.total = self._sum.value()
        exactly = (
            self._sum.data * 2.0 ** self._sum.exponents.double()
        )  # every bit of it, not the value that it rounds to
        return float(exactly.norm())


_SUBTRACTED: dict[str, Callable[[Tensor], _Subtracted]] = {
    "subtracted, float32": functools.partial(_Subtracted, dtype=torch.float32),
    "subtracted, float64": functools.partial(_Subtracted, dtype=torch.float64),
}


def subtracted(model: Performer, tokens: Tensor, chunk: int, way: str) -> list[Tensor]:
    """Algorithm 1 as published: sums that are rolled back by subtraction ("subtracted, float32" or "..., float64")."""
    model.zero_grad(set_to_none=True)
    _sweep_subtracting(model, tokens, chunk, _SUBTRACTED[way])
    return take_gradients(model)


def _sweep_subtracting(model: Performer, tokens: Tensor, chunk: int, make: Callable[[Tensor], _Subtracted]) -> float:
    """Both sweeps: gradients are added to `.grad`; returns the drift."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].long()
    start = model.initial_state(1)
    sums = [tuple(make(one.value) for one in layer) for layer in start["layers"]]
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
        weights, over = row["labels"]["weights"], row["labels"]["over"]
        for way, errors in row["result"]["ways"].items():
            for chunk, error in errors.items():
                key = (weights, over, row["task"]["length"], way, int(chunk))
                plain = row["result"]["plain"]
                found.setdefault(key, []).append((error, math.nan if plain is None else plain))
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


def take_gradients(model: Performer) -> list[Tensor]:
    """Every parameter's gradient, out of the model's hands."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients
