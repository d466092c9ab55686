"""The batches of a run's steps, from any step on, and what it is validated on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slimgrad import InputError
from slimgrad.bytelm import make_task
from slimgrad.data import Batch, Corpus, Documents
from tests.bytelm.settings import TEXT, corpus, documents, tiny

# no two windows are alike
COUNTED = torch.frombuffer(bytearray("".join(f"{number} " for number in range(500)).encode()), dtype=torch.uint8)
KINDS: dict[str, tuple[dict[str, Any], Corpus | None]] = {
    "shuffled": ({}, corpus(COUNTED)),
    "growing": ({"first_length": 24}, corpus(COUNTED)),
    "consecutive": ({"windows": "consecutive", "batch": 2}, corpus(COUNTED)),
    "random": ({"windows": "random", "accumulate": 3}, corpus(COUNTED)),
    "documents": ({"windows": "documents", "batch": 2}, documents(50, 61, 300, 7, 250, 400)),
    "copying": ({"task": "copying", "length": 32, "batch": 2}, None),
}


def parts(batch: Batch) -> list[list[int]]:
    targets = batch.targets if isinstance(batch.targets, list) else [batch.targets]
    return [part.flatten().tolist() for part in [*batch.sequences, *targets] if part is not None]


@pytest.mark.parametrize("name", KINDS)
def test_batches_from_any_step_on_are_those_of_the_whole_run(name: str) -> None:
    changes, text = KINDS[name]
    config = tiny(steps=9, **changes)
    task = make_task(config, text)
    every = [parts(batch) for batch in task.batches(0)]
    assert len(every) == 9 * config.accumulate
    assert every[0] != every[1]
    for first in (1, 5, 9):
        begin = first * config.accumulate
        assert [parts(batch) for batch in task.batches(begin)] == every[begin:]


@pytest.mark.parametrize("name", KINDS)
def test_validation_is_the_same_every_time(name: str) -> None:
    changes, text = KINDS[name]
    task = make_task(tiny(**changes), text)
    first = [parts(batch) for batch in task.validation()]
    assert len(first) > 0
    assert [parts(batch) for batch in task.validation()] == first


def test_no_training_byte_is_validated_on() -> None:
    marked = TEXT.clone()
    marked[-200:] = 255
    task = make_task(tiny(), corpus(marked))
    assert all(int((batch.sequences[0] == 255).sum()) == 0 for batch in task.batches(0))
    assert all(bool((batch.sequences[0] == 255).all()) for batch in task.validation())


def test_validation_shorter_than_a_training_sequence_is_one_window() -> None:
    (batch,) = make_task(tiny(length=300), corpus()).validation()
    assert torch.equal(batch.sequences[0][0], TEXT[-200:])


def test_documents_are_validated_whole_but_for_those_of_one_byte() -> None:
    held_out = Documents([TEXT[:5], TEXT[:1], TEXT[:9]])
    text = Corpus(name="foxes", source="a test", text=Documents([TEXT]), validation=held_out)
    batches = make_task(tiny(windows="documents"), text).validation()
    assert [batch.num_bytes for batch in batches] == [5, 9]


def test_no_run_of_the_copying_task_trains_on_its_validation() -> None:
    task = make_task(tiny(task="copying", length=32, batch=16, seed=0), None)
    held_out = {bytes(row) for batch in task.validation() for row in batch.sequences[0].tolist()}
    seen = {bytes(row) for batch in task.batches(0) for row in batch.sequences[0].tolist()}
    assert len(held_out) == 64
    assert not held_out & seen


def test_a_task_takes_its_own_source_alone() -> None:
    with pytest.raises(InputError, match="makes its own sequences: expected no corpus, got fox"):
        make_task(tiny(task="copying", length=32), corpus())
    with pytest.raises(InputError, match="expected a corpus to learn from, got none"):
        make_task(tiny(), None)
    with pytest.raises(InputError, match="expected at least 297 bytes"):
        make_task(tiny(), corpus(TEXT[:296]))
