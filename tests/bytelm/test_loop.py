"""Training: it learns, it repeats itself in every bit, it stops where numbers stop meaning anything."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import slimgrad as sg
from slimgrad.bytelm import Row, build_model, loop, make_task, plan_schedule, train, validate
from slimgrad.data import Corpus, Documents
from slimgrad.models import Performer
from tests.bytelm.settings import TEXT, corpus, documents, timeless, tiny


def test_training_lowers_both_losses() -> None:
    reported: list[Row] = []
    trained = train(tiny(), corpus(), reported.append)
    assert reported == trained.rows
    assert trained.rows[0].bits == pytest.approx(8, abs=1.5)
    assert trained.rows[-1].bits < 3.5  # measured: 2.3
    assert trained.validation_bits < 3.5
    assert [row.step for row in trained.rows if row.validation_bits is not None] == [10, 20, 30]
    assert [row.bytes_seen for row in trained.rows] == [97 * step for step in range(1, 31)]


@pytest.mark.parametrize("first_length", [0, 24])
def test_one_seed_gives_one_run_in_every_bit(first_length: int) -> None:
    runs = [train(tiny(steps=6, first_length=first_length, seed=seed), corpus()) for seed in (5, 5, 6)]
    bits = [[row.bits for row in run.rows] for run in runs]
    assert bits[0] == bits[1] != bits[2]
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_chunk_does_not_move_the_result() -> None:
    runs = [train(tiny(steps=4, chunk=chunk), corpus()) for chunk in (13, 97)]
    for a, b in zip(runs[0].rows, runs[1].rows, strict=True):
        assert a.bits == pytest.approx(b.bits, rel=1e-4)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)


def test_training_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_model(tiny())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(sg.NonFiniteError):
        train(tiny(learning_rate=1e30), corpus())


def test_validation_is_the_mean_over_windows_in_bits_per_byte() -> None:
    config = tiny(chunk=40)
    model = build_model(config)
    losses, right = [], 0
    for window in (TEXT[:97], TEXT[97:194]):
        logits, _ = model(window[None, :-1], model.initial_state(1))
        right += int((logits[0].argmax(-1) == window[1:]).sum())
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[1:].long()))
    expected = float(torch.stack(losses).detach().mean()) / math.log(2)
    text = Corpus(name="fox", source="a test", text=Documents([TEXT]), validation=Documents([TEXT[:200]]))
    bits, accuracy = validate(config, model, make_task(config, text))
    assert bits == pytest.approx(expected, rel=1e-6)
    assert accuracy == pytest.approx(right / (2 * 96))


@pytest.mark.parametrize("changes", [{}, {"first_length": 24}, {"eval_every": 7}])
def test_the_last_step_always_ends_with_a_validation(changes: dict[str, int | None]) -> None:
    rows = train(tiny(steps=16, **({"eval_every": None} | changes)), corpus()).rows
    validated = [row.step for row in rows if row.validation_bits is not None]
    assert validated[-1] == 16
    assert len(validated) == (3 if "eval_every" in changes else 5)


def test_batches_that_accumulate_are_one_large_batch() -> None:
    config = {"steps": 3, "windows": "consecutive", "learning_rate": 1e-3}
    together = train(tiny(batch=4, **config), corpus()).rows
    apart = train(tiny(accumulate=4, **config), corpus()).rows
    for a, b in zip(together, apart, strict=True):
        assert a.num_bytes == b.num_bytes == 4 * 97
        assert a.bits == pytest.approx(b.bits, rel=1e-6)  # measured: 4.2e-8
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-5)  # measured: 1.0e-7


def test_whole_documents_are_sequences_of_their_own_length() -> None:
    rows = train(tiny(windows="documents", batch=2, steps=4, length=300), documents(50, 61, 300, 7, 250)).rows
    assert {row.length for row in rows} <= {7, 50, 61, 300}
    assert sum(row.num_bytes for row in rows) == rows[-1].bytes_seen


def test_copying_is_learnt_without_a_corpus() -> None:
    config = tiny(task="copying", length=16, batch=8, steps=8)
    rows = train(config).rows
    assert rows[0].bits == pytest.approx(8, abs=1.5)
    assert rows[-1].bits < rows[0].bits


def test_bf16_stays_near_float32() -> None:
    rows = [train(tiny(steps=4, precision=precision), corpus()).rows[-1].bits for precision in ("float32", "bf16")]
    assert rows[0] != rows[1]
    assert rows[0] == pytest.approx(rows[1], rel=0.002)  # measured: 1.5e-4


def test_random_features_are_drawn_by_the_seed_and_the_step_alone() -> None:
    shape = dataclasses.replace(tiny().model, feature_map="favor", features=8, normalize=True)
    runs: list[list[Row]] = []
    for state in (1, 2):
        torch.manual_seed(state)
        runs.append(train(tiny(model=shape, steps=3), corpus()).rows)
    assert timeless(runs[0]) == timeless(runs[1])


def test_no_schedule_moves_a_bit() -> None:
    schedules = ("auto", "rebuild", "keep@disk", "every:2", "binomial:2@host")
    rows = [timeless(train(tiny(steps=2, schedule=schedule), corpus()).rows) for schedule in schedules]
    assert rows[1:] == rows[:-1]


def test_the_plan_is_the_schedule_that_was_asked_for_or_says_why() -> None:
    config = tiny(schedule="every:2")
    assert plan_schedule(config, build_model(config)) == (sg.Every(2), f"{sg.Every(2)}, as asked for")
    schedule, reason = plan_schedule(tiny(), build_model(tiny()))
    assert isinstance(schedule, sg.Schedule)
    assert "bytes" in reason


def test_a_gradient_that_is_no_number_moves_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_model(tiny()).state_dict()
    seen: list[Performer] = []

    def spoilt(model: Performer, *_: object, **__: object) -> float:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        seen.append(model)
        return 1.0

    monkeypatch.setattr(loop, "add_gradient", spoilt)
    with pytest.raises(sg.NonFiniteError, match=r"step 1: expected a finite loss and gradient, got loss 1\.0 and"):
        train(tiny(), corpus())
    assert all(torch.equal(value, before[name]) for name, value in seen[0].state_dict().items())


@pytest.mark.parametrize(
    "changes", [{}, {"windows": "documents", "batch": 2}, {"batch": 3}, {"method": "plain"}, {"method": "checkpoint"}]
)
def test_what_is_read_as_it_is_used_trains_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in validation, across the edges of documents."""
    config = tiny(steps=2, windows="random").replace(**changes)
    expected = train(config, documents(150, 90, 300, 170)).rows
    monkeypatch.setattr("slimgrad.data.documents.AT_ONCE", 10)
    assert timeless(train(config, documents(150, 90, 300, 170)).rows) == timeless(expected)
