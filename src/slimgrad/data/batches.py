"""What goes through a model together: windows of a text, whole documents, or the copying task."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimgrad.data.documents import Documents, Windows
from slimgrad.data.options import Order
from slimgrad.data.windows import require_window, shuffled_starts
from slimgrad.errors import InputError

IGNORED = -100


Sequences = Tensor | Windows  # of one length, side by side: uint8 `[batch, length]`


class Batch(NamedTuple):
    """Sequences of one length, or whole documents. Those that are long are readers, of which nothing is in memory.

    Attributes:
        inputs: uint8 `[batch, length]`, or a list of documents, each `[1, bytes]`.
        targets: int64 like the inputs, -100 where none counts; None: the next byte is the target.
    """

    inputs: Sequences | list[Sequences]
    targets: Tensor | list[Tensor] | None = None

    @property
    def sequences(self) -> list[Sequences]:
        """The inputs as a list."""
        return self.inputs if isinstance(self.inputs, list) else [self.inputs]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of each of the inputs: sequences side by side, and bytes of each."""
        return [(x.batch, x.length) if isinstance(x, Windows) else (x.shape[0], x.shape[1]) for x in self.sequences]

    @property
    def num_bytes(self) -> int:
        """Bytes of all sequences."""
        return sum(batch * length for batch, length in self.shapes)

    @property
    def longest(self) -> int:
        """Bytes of the longest sequence."""
        return max(length for _, length in self.shapes)

    @property
    def num_targets(self) -> int:
        """Targets that count."""
        if self.targets is None:
            return sum(batch * (length - 1) for batch, length in self.shapes)
        targets = self.targets if isinstance(self.targets, list) else [self.targets]
        return sum(int((x != IGNORED).sum()) for x in targets)


def whole(sequences: Sequences) -> Tensor:
    """All of them in memory."""
    return sequences.read(0, sequences.length) if isinstance(sequences, Windows) else sequences


def text_batches(
    text: Documents, lengths: Sequence[int], *, batch: int, order: Order, seed: int, first: int = 0
) -> Iterator[Batch]:
    """One batch of the text for each of `lengths`, from number `first` on.

    Args:
        text: where windows are cut from.
        lengths: bytes of the sequences of each batch; "documents" takes no notice.
        batch: sequences in one.
        order: "shuffled" (see `shuffled_starts`; a run of equal lengths goes through the text in passes),
            "consecutive" (one after the other, from the start again at the end), "random" (from any byte on), or
            "documents" (whole ones, each pass in a new random order; those of one byte are left out).
        seed: decides the order.
        first: how many batches to pass over. Nothing is read for them, and what follows is as if they had been taken.

    Raises:
        InputError: the text is shorter than a window.
    """
    if order == "documents":
        yield from _whole_documents(text, len(lengths), batch, seed, first)
        return
    spans = _spans(len(text), lengths, batch, order, seed)
    for length, starts in itertools.islice(spans, first, None):
        yield Batch(text.windows(starts, length))


def copying_batches(length: int, steps: int, *, batch: int, seed: int, first: int = 0) -> Iterator[Batch]:
    """The copying task: 0, w, 0, w, with w drawn from 1..255; only the second half counts.

    Source: "Sub-Linear Memory: How to Make Performers SLiM" (NeurIPS 2021), section 4.3.

    Args:
        length: symbols of a sequence, even.
        steps: how many batches there are in all.
        batch: sequences in one.
        seed: with the batch's number it decides the words.
        first: how many batches to pass over, at no cost.
    """
    if length < 4 or length % 2:
        raise InputError(f"length={length}: expected an even number of at least 4, for two equal halves")
    half = length // 2
    for number in range(first, steps):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number) % (1 << 63))
        words = torch.randint(1, 256, (batch, half - 1), generator=generator, dtype=torch.int64)
        once = torch.nn.functional.pad(words, (1, 0))
        sequence = torch.cat([once, once], dim=1)
        targets = torch.nn.functional.pad(sequence[:, 1:], (0, 1), value=IGNORED)
        targets[:, : half - 1] = IGNORED  # position p predicts p + 1
        yield Batch(sequence.to(torch.uint8), targets)


def _spans(
    num_bytes: int, lengths: Sequence[int], batch: int, order: Order, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Length and starts of each batch's windows."""
    generator = torch.Generator().manual_seed(seed)
    place = 0
    for length, run in itertools.groupby(lengths):
        require_window(num_bytes, length)
        shuffled = shuffled_starts(num_bytes, length, generator)
        for _ in run:
            starts: list[int] = []
            for _ in range(batch):
                if order == "shuffled":
                    starts.append(next(shuffled))
                elif order == "random":
                    starts.append(int(torch.randint(num_bytes - length + 1, (), generator=generator)))
                else:
                    place = place if place + length <= num_bytes else 0
                    starts.append(place)
                    place += length
            yield length, starts


def _whole_documents(text: Documents, count: int, batch: int, seed: int, first: int) -> Iterator[Batch]:
    spans = [(start, stop) for start, stop in text.spans if stop - start > 1]
    if not spans:
        raise InputError("expected a document of at least two bytes, one to read and one to predict, found none")
    generator = torch.Generator().manual_seed(seed)
    order = (i for _ in itertools.repeat(None) for i in torch.randperm(len(spans), generator=generator).tolist())
    numbers = itertools.islice(order, first * batch, None)
    for _ in range(first, count):
        taken = [spans[i] for i in itertools.islice(numbers, batch)]
        yield Batch([text.windows([start], stop - start) for start, stop in taken])
