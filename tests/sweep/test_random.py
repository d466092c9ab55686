"""Each chunk draws from its own seed, and the user's generator does not notice."""

from __future__ import annotations

import torch

import slimgrad as sg
from slimgrad.sweep.random import derive_seed, draw_seed, seeded
from tests.toy_models import GatedRecurrence

CPU = torch.device("cpu")
TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13


def test_seeded_draws_repeat_and_restore() -> None:
    before = torch.get_rng_state()
    with seeded(7, CPU):
        first = torch.rand(5)
    with seeded(7, CPU):
        second = torch.rand(5)
    with seeded(8, CPU):
        other = torch.rand(5)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_restores_after_an_error_and_nests() -> None:
    before = torch.get_rng_state()
    try:
        with seeded(1, CPU):
            torch.rand(3)
            with seeded(2, CPU):
                torch.rand(3)
            inner = torch.rand(1)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(1, CPU):
        torch.rand(3)
        assert torch.equal(inner, torch.rand(1))


def test_derived_seeds_are_distinct_and_fit_the_generator() -> None:
    seeds = {derive_seed(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(-1, 5000)}
    assert len(seeds) == 3 * 5001
    assert all(0 <= seed < 2**64 for seed in seeds)
    with seeded(2**64 - 1, CPU):
        torch.rand(1)


def test_neighbouring_seeds_do_not_draw_alike() -> None:
    draws = []
    for index in range(50):
        with seeded(derive_seed(0, index), CPU):
            draws.append(torch.randn(200))
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max()
    assert correlation < 0.3  # of 1,225 pairs of 200 normal draws the largest was measured at 0.22


def test_a_seed_is_one_draw_of_the_users_generator() -> None:
    torch.manual_seed(5)
    first, second = draw_seed(), draw_seed()
    assert first != second
    torch.manual_seed(5)
    assert draw_seed() == first
    assert draw_seed() == second
    assert 0 <= first < 2**64


def test_a_call_takes_exactly_one_draw() -> None:
    model = GatedRecurrence(dropout=0.3)
    torch.manual_seed(9)
    draw_seed()
    expected = torch.rand(4)
    for call in (sg.backward, sg.evaluate, sg.loss, sg.token_loss):
        torch.manual_seed(9)
        call(model, TOKENS, chunk=7)
        assert torch.equal(torch.rand(4), expected)


def test_dropout_differs_between_calls_and_chunks_and_repeats_from_a_seed() -> None:
    model = GatedRecurrence(dropout=0.5)
    losses = []
    for seed in (3, None, 3):
        if seed is not None:
            torch.manual_seed(seed)
        losses.append(float(sg.backward(model, TOKENS, chunk=7).loss))
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def test_sequences_of_one_call_draw_differently() -> None:
    model = GatedRecurrence(dropout=0.5)
    each = sg.token_loss(model, [TOKENS[:1], TOKENS[:1]], chunk=7)
    assert not torch.equal(each[0], each[1])
