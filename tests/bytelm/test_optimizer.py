"""AdamW's groups, and the learning rate over a run."""

from __future__ import annotations

import pytest

from slimgrad.bytelm import build_model
from slimgrad.bytelm.optimizer import learning_rate_at, make_optimizer, set_learning_rate
from tests.bytelm.settings import tiny


def test_matrices_decay_and_vectors_do_not() -> None:
    model = build_model(tiny())
    optimizer = make_optimizer(tiny(weight_decay=0.3, betas=(0.5, 0.75)), model)
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert decayed["betas"] == kept["betas"] == (0.5, 0.75)


def test_every_parameter_has_one_learning_rate() -> None:
    optimizer = make_optimizer(tiny(), build_model(tiny()))
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    config = tiny(warmup=0.1, learning_rate=1.0)
    rates = [learning_rate_at(config, i / 100, (i + 1) / 100) for i in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert learning_rate_at(tiny(warmup=0, learning_rate=1.0), 0, 0.01) == 1.0
    assert learning_rate_at(tiny(warmup=1, learning_rate=1.0), 0.9, 1.0) == 1.0


def test_the_learning_rate_may_be_constant_or_drop_to_a_tenth_after_two_thirds() -> None:
    places = [(i / 30, (i + 1) / 30) for i in range(30)]
    constant = tiny(decay="constant", warmup=0, learning_rate=1.0)
    assert {learning_rate_at(constant, *place) for place in places} == {1.0}
    drop = tiny(decay="drop", warmup=0, learning_rate=1.0)
    assert [learning_rate_at(drop, *place) for place in places] == [1.0] * 20 + [0.1] * 10
