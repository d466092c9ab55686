"""Training: it learns, it repeats itself in every bit, it stops where numbers stop meaning anything."""

from __future__ import annotations

import math

import pytest
import torch

import slimgrad as sg
from slimgrad.train import Row, build_model, train
from slimgrad.train.loop import learning_rate_at, validate
from tests.train.settings import TEXT, tiny


def test_training_lowers_both_losses() -> None:
    reported: list[Row] = []
    trained = train(tiny(), TEXT, reported.append)
    assert reported == trained.rows
    assert trained.rows[0].bits == pytest.approx(8, abs=1.5)
    assert trained.rows[-1].bits < 3.5  # measured: 2.3
    assert trained.validation_bits < 3.5
    assert [row.step for row in trained.rows if row.validation_bits is not None] == [10, 20, 30]
    assert [row.bytes_seen for row in trained.rows] == [97 * step for step in range(1, 31)]


@pytest.mark.parametrize("first_length", [0, 24])
def test_one_seed_gives_one_run_in_every_bit(first_length: int) -> None:
    runs = [train(tiny(steps=6, first_length=first_length, seed=seed), TEXT) for seed in (5, 5, 6)]
    bits = [[row.bits for row in run.rows] for run in runs]
    assert bits[0] == bits[1] != bits[2]
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_chunk_does_not_move_the_result() -> None:
    runs = [train(tiny(steps=4, chunk=chunk), TEXT) for chunk in (13, 97)]
    for a, b in zip(runs[0].rows, runs[1].rows, strict=True):
        assert a.bits == pytest.approx(b.bits, rel=1e-4)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)


def test_training_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_model(tiny())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(sg.NonFiniteError):
        train(tiny(learning_rate=1e30), TEXT)


def test_too_little_text_is_refused_before_any_work() -> None:
    with pytest.raises(sg.InputError, match="expected at least 297 bytes"):
        train(tiny(), TEXT[:296])


def test_validation_is_the_mean_over_windows_in_bits_per_byte() -> None:
    config = tiny(chunk=40)
    model = build_model(config)
    losses = []
    for window in (TEXT[:97], TEXT[97:194]):
        logits, _ = model(window[None, :-1], model.initial_state(1))
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[1:].long()))
    expected = float(torch.stack(losses).detach().mean()) / math.log(2)
    assert validate(config, model, TEXT[:200]) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    config = tiny(warmup=0.1, learning_rate=1.0)
    rates = [learning_rate_at(config, i / 100, (i + 1) / 100) for i in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert learning_rate_at(tiny(warmup=0, learning_rate=1.0), 0, 0.01) == 1.0
    assert learning_rate_at(tiny(warmup=1, learning_rate=1.0), 0.9, 1.0) == 1.0
