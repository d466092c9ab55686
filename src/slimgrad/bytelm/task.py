"""What a run learns: the batches of its steps, and what it is validated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from slimgrad.bytelm.config import TrainConfig
from slimgrad.data import Batch, Corpus, Documents, Split, consecutive_starts, copying_batches, text_batches
from slimgrad.errors import InputError

_COPYING_VALIDATION_BATCHES, _COPYING_BATCH = 4, 16


class Task(Protocol):
    """Where batches come from."""

    def batches(self, first: int) -> Iterator[Batch]:
        """The training batches, beginning with number `first`."""
        ...

    def validation(self) -> Iterable[Batch]:
        """What the model is validated on, the same every time."""
        ...


def make_task(config: TrainConfig, corpus: Corpus | None) -> Task:
    """The task of a configuration.

    Raises:
        InputError: the corpus is missing or too short, or is not wanted.
    """
    if config.task == "copying":
        if corpus is not None:
            raise InputError(f"the copying task makes its own sequences: expected no corpus, got {corpus.name}")
        return _Copying(config)
    if corpus is None:
        raise InputError("expected a corpus to learn from, got none")
    window = 2 if config.windows == "documents" else config.length
    return _Text(config, *split_corpus(config, corpus, window))


def split_corpus(config: TrainConfig, corpus: Corpus, window: int = 2) -> Split:
    """What a run trains on and what it is validated on. Raises `InputError` where the text is too short for both."""
    return corpus.split(validation_bytes=config.validation_bytes, window=window, held_out=config.validation)


class _Text:
    def __init__(self, config: TrainConfig, train: Documents, validation: Documents) -> None:
        self._config, self._train, self._validation = config, train, validation

    def batches(self, first: int) -> Iterator[Batch]:
        config = self._config
        lengths = [length for length in config.step_lengths() for _ in range(config.accumulate)]
        return text_batches(
            self._train, lengths, batch=config.batch, order=config.windows, seed=config.seed, first=first
        )

    def validation(self) -> Iterable[Batch]:
        """Consecutive windows of the training length (or all there is, where it is shorter), or whole documents."""
        text = self._validation
        if self._config.windows == "documents":
            return (Batch(text.windows([start], stop - start)) for start, stop in text.spans if stop - start > 1)
        length = min(self._config.length, len(text))
        return (Batch(text.windows([start], length)) for start in consecutive_starts(len(text), length))


class _Copying:
    def __init__(self, config: TrainConfig) -> None:
        self._config = config

    def batches(self, first: int) -> Iterator[Batch]:
        config = self._config
        total = config.steps * config.accumulate
        return copying_batches(config.length, total, batch=config.batch, seed=config.seed, first=first)

    def validation(self) -> Iterable[Batch]:
        """Sequences that no run trains on: seeds of runs are not negative."""
        return copying_batches(self._config.length, _COPYING_VALIDATION_BATCHES, batch=_COPYING_BATCH, seed=-1)
