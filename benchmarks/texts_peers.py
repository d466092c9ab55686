"""What a byte model is compared with: compressors, a smoothed n-gram model, an LSTM."""

from __future__ import annotations

import bz2
import lzma
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, nn
from torch.nn import functional

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "xz -9e": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
    "bzip2 -9": lambda content: bz2.compress(content, 9),
    "zstd --ultra -22": lambda content: zstandard.compress(content, 22),
}
ORDER = 6
BATCH, SPAN, EMBEDDING = 8, 64, 64
WARMUP = 0.05
LOOKS = 10


def kneser_ney_bits(train: np.ndarray, held_out: np.ndarray) -> float:
    """Bits of the held-out bytes by interpolated Kneser-Ney: contexts of five bytes and fewer, counted in training.

    An n-gram is a number in base 256. At order n, with c(h w) the times that w followed h (below the highest order: the
    number of different bytes before h w), D the order's discount n1 / (n1 + 2 n2), and N(h) the different w after h:

        p(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) * p(w | h without its first byte);    uniform at the end

    Source: Kneser and Ney 1995; interpolated: Chen and Goodman 1998, section 2.8. Cost: one sort per order.
    """
    grams: list[tuple[np.ndarray, np.ndarray]] = []  # per order: the n-grams that there are, and their counts
    codes, times = np.unique(_codes(train, ORDER), return_counts=True)
    for order in range(ORDER, 0, -1):
        grams.append((codes, times))
        codes, times = np.unique(codes % np.uint64(256 ** (order - 1)), return_counts=True)
    stream = np.concatenate([train[-(ORDER - 1) :], held_out])
    p = np.full(len(held_out), 1 / 256)
    for order, (found, counts) in enumerate(reversed(grams), start=1):
        contexts, first = np.unique(found // np.uint64(256), return_index=True)
        different, total = np.diff(np.append(first, len(found))), np.add.reduceat(counts, first)
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5
        wanted = _codes(stream, order)[ORDER - order :]
        here, times = _look_up(found, counts, wanted)
        known, sums = _look_up(contexts, total, wanted // np.uint64(256))
        kinds = _look_up(contexts, different, wanted // np.uint64(256))[1]
        mixed = (np.where(here, np.maximum(times - discount, 0), 0) + discount * kinds * p) / np.maximum(sums, 1)
        p = np.where(known, mixed, p)
    return float(-np.log2(p).sum())


def _codes(content: np.ndarray, order: int) -> np.ndarray:
    """The n-grams of the bytes as numbers, `[len - order + 1]`: the first byte is the highest digit."""
    codes = np.zeros(len(content) - order + 1, dtype=np.uint64)
    for place in range(order):
        codes = codes * np.uint64(256) + content[place : place + len(codes)]
    return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the wanted are among the sorted keys, and their values (0 where they are not)."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[places] == wanted
    return there, np.where(there, values[places], 0)


class LSTM(nn.Module):
    """A byte model: an embedding, torch's LSTM of one layer, a linear head."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, EMBEDDING), nn.Linear(hidden, 256)
        self.lstm = nn.LSTM(EMBEDDING, hidden, batch_first=True)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits `[batch, time, 256]`, and the state after them."""
        hidden, state = self.lstm(self.embed(tokens), state)
        return self.head(hidden), state

    @staticmethod
    def of_size(parameters: int) -> LSTM:
        """The one whose number of parameters is nearest, among widths that are multiples of eight."""
        torch.manual_seed(0)
        return min((LSTM(hidden) for hidden in range(64, 1024, 8)), key=lambda model: abs(size(model) - parameters))


def size(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def train_lstm(
    train: np.ndarray, held_out: np.ndarray, *, parameters: int, cpu_seconds: float, learning_rate: float
) -> dict[str, Any]:
    """Truncated backpropagation: `BATCH` streams side by side, `SPAN` bytes a step, the state going on.

    AdamW, warm-up, cosine and clipping are our preset's, over the CPU seconds. Ten looks at the held-out bytes on the
    way, whose seconds do not count, tell where it would have been best to stop.
    """
    model = LSTM.of_size(parameters)
    text, held = torch.from_numpy(train).long(), torch.from_numpy(held_out).long()
    row = len(text) // BATCH
    streams = text[: row * BATCH].view(BATCH, row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    place, state, steps, looks = 0, None, 0, list[float]()
    began = time.process_time()
    while (done := (time.process_time() - began) / cpu_seconds) < 1:
        if done * LOOKS > len(looks) + 1:
            stopped = time.process_time()
            looks.append(bits_per_byte(model, held))
            began += time.process_time() - stopped
        falling = 0.5 * (1 + math.cos(math.pi * max(done - WARMUP, 0) / (1 - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(max(done, 1e-4) / WARMUP, falling)
        if place + SPAN + 1 > row:
            place, state = 0, None
        window = streams[:, place : place + SPAN + 1]
        logits, state = model(window[:, :-1], state)
        state = tuple(part.detach() for part in state)
        functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        place, steps = place + SPAN, steps + 1
    seconds = time.process_time() - began
    bits = bits_per_byte(model, held)
    return {
        "bits_per_byte": bits,
        "lowest_bits_per_byte": min(*looks, bits),
        "cpu_seconds": seconds,
        "parameters": size(model),
        "steps": steps,
        "bytes_seen": steps * BATCH * SPAN,
    }


@torch.no_grad()
def bits_per_byte(model: LSTM, held: Tensor) -> float:
    """As one stream, from nothing; of the first byte nothing is known."""
    logits, _ = model(held[None, :-1])
    return (float(functional.cross_entropy(logits[0], held[1:], reduction="sum")) / math.log(2) + 8) / len(held)
