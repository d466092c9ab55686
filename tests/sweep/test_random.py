"""Each chunk draws from its own seed, and the user's generator does not notice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import slimgrad as sg
from slimgrad.errors import InputError
from slimgrad.sweep.random import derive_seed, draw_seed, generators, seeded
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
    seeds = {derive_seed(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(-1, 5000)}
    assert len(seeds) == 3 * 5001
    assert all(0 <= seed < 2**64 for seed in seeds)
    with seeded(2**64 - 1, CPU):
        torch.rand(1)


def test_neighbouring_seeds_do_not_draw_alike() -> None:
    draws = []
    for position in range(50):
        with seeded(derive_seed(0, position), CPU):
            draws.append(torch.randn(200))
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max()
    assert correlation < 0.3  # of 1,225 pairs of 200 normal draws the largest was measured at 0.22


class Backend:
    """Stands in for torch.xpu on a machine with two such devices, the first of them the current one."""

    def __init__(self) -> None:
        self.default_generators: list[torch.Generator] = []  # as torch.cuda has it before CUDA's first use

    def init(self) -> None:
        self.default_generators = self.default_generators or [torch.Generator(), torch.Generator()]

    def current_device(self) -> int:
        return 0


@pytest.mark.parametrize(("device", "own"), [("xpu:1", 1), ("xpu:0", 0), ("xpu", 0)])
def test_the_models_own_device_is_seeded_and_no_other(monkeypatch: pytest.MonkeyPatch, device: str, own: int) -> None:
    backend = Backend()
    monkeypatch.setattr(torch, "xpu", backend)
    assert len(generators(torch.device(device))) == 2
    mine, other = backend.default_generators[own], backend.default_generators[1 - own]
    every = [torch.default_generator, mine, other]
    before = [generator.get_state() for generator in every]
    with seeded(7, torch.device(device)):
        assert torch.equal(other.get_state(), before[2])
        assert [generator.initial_seed() for generator in every[:2]] == [7, 7]
        assert torch.equal(torch.rand(3), torch.rand(3, generator=mine))
        torch.rand(3, generator=other)
    after = [generator.get_state() for generator in every]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])  # another device's generator is its user's affair


def test_every_device_of_a_model_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    monkeypatch.setattr(torch, "xpu", backend)
    devices = [torch.device(name) for name in ("xpu:1", "cpu", "xpu:0")]
    first, second = generators(*devices)[2], generators(*devices)[1]
    assert [first, second] == backend.default_generators
    with seeded(7, *devices):
        assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=second))


def test_generators_of_a_cpu_of_mps_and_of_who_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert generators(CPU) == [torch.default_generator]
    apple = torch.Generator()
    monkeypatch.setattr(torch, "mps", SimpleNamespace(_get_default_mps_generator=lambda: apple))
    assert generators(torch.device("mps")) == [torch.default_generator, apple]
    monkeypatch.setattr(torch, "hpu", SimpleNamespace(), raising=False)
    for device in ("hpu:0", "meta"):
        with pytest.raises(InputError, match=r"expected torch\.(hpu|meta)\.default_generators"):
            generators(torch.device(device))


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
