"""Exact sums: how close they are to the truth beside plain addition, whatever is beside an element, and what they cost.

    python -m benchmarks.sums [--repeats 5]      # five minutes on one core; writes results/sums.json

1. Sums of many contributions, in one tensor whose heads are scaled by 1 to 2^-60: the error of the worst element, of
   the largest partial sum it had, over that of adding up in the same type. The truth is rational.
2. The same scales on the keys of a linear attention, whose outputs they do not change: the error of each head's
   gradient over that of plain backpropagation. The truth is plain backpropagation in float64.
3. The Performer with random features ("favor"), one head's keys twelve times as large: likewise, the worst parameter.
4. The share of one gradient's time that is spent in the accumulators: adding, subtracting and rounding their values.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import slimgrad as sg
from benchmarks.measure import Case, save
from slimgrad.models import Performer, PerformerConfig
from slimgrad.states.accumulator import Accumulator
from slimgrad.verification.reference import plain_backward

SCALES = [0, -12, -24, -40, -60]  # powers of two
CONTRIBUTIONS, ELEMENTS = 500, 64
LENGTH, CHUNK = 512, 16
THIN = PerformerConfig(layers=2, width=128, heads=2)


class Heads(nn.Module):
    """Linear attention whose heads have keys of all sizes: `scales` cancel between numerator and denominator."""

    def __init__(self, width: int = 8, vocabulary: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in SCALES)
        self.head = nn.Linear(width * len(SCALES), vocabulary)

    def initial_state(self, batch_size: int) -> sg.PrefixSum:
        width = self.embed.embedding_dim
        return sg.PrefixSum(self.head.weight.new_zeros(batch_size, len(SCALES), width, width + 1))

    def forward(self, inputs: Tensor, state: sg.PrefixSum) -> tuple[Tensor, sg.PrefixSum]:
        x = self.embed(inputs)
        q, k, v = torch.stack([qkv(x) for qkv in self.qkv], 2).chunk(3, -1)  # [batch, time, heads, width]
        scales = torch.tensor([2.0**scale for scale in SCALES], dtype=x.dtype)[:, None]
        q, k = F.elu(q) + 1, (F.elu(k) + 1) * scales
        within = (k[..., None] * F.pad(v, (0, 1), value=1.0)[..., None, :]).cumsum(1)
        before, following = state.advance(within[:, -1])
        mixed = torch.einsum("bthf,bthfv->bthv", q, before[:, None] + within)
        return self.head((mixed[..., :-1] / mixed[..., -1:]).flatten(2)), following


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = [
        *(row for dtype in (torch.float32, torch.float64) for row in compare_sums(dtype)),
        *compare_heads(),
        *(compare_favor(seed) for seed in range(5)),
        *(measure_share(*case, repeats) for case in cost_cases()),
    ]
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    print(save("sums", rows))


def compare_sums(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Each head's worst element: exact sums and plain ones."""
    torch.manual_seed(0)
    scales = torch.tensor([[2.0**scale] for scale in SCALES], dtype=dtype)
    deltas = torch.randn(CONTRIBUTIONS, len(SCALES), ELEMENTS, dtype=dtype) * scales
    sums, plain = Accumulator(torch.zeros_like(deltas[0])), torch.zeros_like(deltas[0])
    for delta in deltas:
        sums.add(delta, log=True)
        plain = plain + delta
    value = sums.value()
    for delta in deltas.flip(0):
        assert sums.subtract(delta)
    assert not bool(sums.data.any()), "the way back does not end where it began"
    for head, scale in enumerate(SCALES):
        ours, theirs = (worst(x[head], deltas[:, head]) for x in (value, plain))
        yield {
            "of": "sums",
            "dtype": str(dtype),
            "scale": scale,
            "error": ours,
            "plain": theirs,
            "ratio": ours / theirs,
        }


def worst(sums: Tensor, deltas: Tensor) -> float:
    """The largest error of an element, of the largest partial sum that it had."""
    errors: list[float] = []
    for got, column in zip(sums.tolist(), deltas.T, strict=True):
        total = largest = Fraction(0)
        for x in column.tolist():
            total += Fraction(x)
            largest = max(largest, abs(total))
        errors.append(float(abs(Fraction(got) - total) / largest))
    return max(errors)


def compare_heads() -> Iterator[dict[str, Any]]:
    """The gradient of each head's projection, in float32."""
    torch.manual_seed(0)
    model = Heads()
    tokens = torch.randint(0, 16, (1, LENGTH))
    truth = gradients(plain(copy.deepcopy(model).double(), tokens))
    theirs = gradients(plain(model, tokens))
    sg.backward(model, tokens, chunk=CHUNK)
    ours = gradients(model)
    for head, scale in enumerate(SCALES):
        name = f"qkv.{head}.weight"
        a, b = (off(side[name], truth[name]) for side in (ours, theirs))
        yield {"of": "gradients", "dtype": "torch.float32", "scale": scale, "error": a, "plain": b, "ratio": a / b}


def compare_favor(seed: int) -> dict[str, Any]:
    """The library's own case of sums of all sizes."""
    torch.manual_seed(seed)
    model = Performer(PerformerConfig(layers=1, width=32, heads=2, feature_map="favor"))
    with torch.no_grad():
        model.layers[0].key_value.weight[:16] *= 12
    tokens, state = torch.randint(0, 256, (2, 64)), model.initial_state(2)
    truth = gradients(plain(copy.deepcopy(model).double(), tokens, tree_map(widen, state)))
    theirs = gradients(plain(model, tokens, state))
    sg.backward(model, tokens, chunk=CHUNK, state=state)
    ours = gradients(model)
    a, b = (max(off(side[name], truth[name]) for name in truth) for side in (ours, theirs))
    return {"of": "favor", "dtype": "torch.float32", "seed": seed, "error": a, "plain": b, "ratio": a / b}


def widen(leaf: Any) -> Any:
    if isinstance(leaf, sg.PrefixSum):
        return sg.PrefixSum(widen(leaf.value))
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def plain(model: nn.Module, tokens: Tensor, state: Any = None) -> nn.Module:
    """Plain backpropagation into `model`, which is returned."""
    plain_backward(model, tokens, state=state)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Taken off the model, in float64."""
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def off(gradient: Tensor, truth: Tensor) -> float:
    return float((gradient - truth).norm() / truth.norm())


def cost_cases() -> list[tuple[str, Performer, int, int]]:
    """Name, model, length, chunk."""
    torch.manual_seed(0)
    thin = Performer(THIN)
    published, _, _ = Case(model="III", length=4096, method="rebuild", chunk=256).build()
    return [("III", published, 4096, 256), ("2 layers of 128", thin, 8192, 256), ("2 layers of 128", thin, 4096, 64)]


def measure_share(name: str, model: Performer, length: int, chunk: int, repeats: int) -> dict[str, Any]:
    """CPU seconds within the accumulators, of those of the gradient; the median of some, after one to warm up."""
    tokens = torch.randint(0, 256, (1, length), dtype=torch.uint8)
    within, whole = [], []
    for _ in range(repeats + 1):
        model.zero_grad(set_to_none=True)
        with accumulators_timed() as spent:
            start = time.process_time()
            sg.backward(model, tokens, chunk=chunk, schedule=sg.Rebuild())
            whole.append(time.process_time() - start)
        within.append(sum(spent))
    shares = [part / all_ for part, all_ in zip(within[1:], whole[1:], strict=True)]
    return {
        "of": "cost", "model": name, "length": length, "chunk": chunk, "cpu_seconds": median(whole[1:]),
        "share": median(shares), "share_min": min(shares), "share_max": max(shares),
    }  # fmt: skip


@contextmanager
def accumulators_timed() -> Iterator[list[float]]:
    """The CPU seconds of each call of an accumulator."""
    seconds: list[float] = []
    methods: dict[str, Callable[..., Any]] = {name: getattr(Accumulator, name) for name in ("add", "subtract", "value")}

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = method(*args, **kwargs)
            seconds.append(time.process_time() - start)
            return result

        return call

    for name, method in methods.items():
        setattr(Accumulator, name, timed(method))
    try:
        yield seconds
    finally:
        for name, method in methods.items():
            setattr(Accumulator, name, method)


if __name__ == "__main__":
    main()
