"""Generation from the recurrent state is generation from the whole prefix, and its state does not grow."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slimgrad import InputError, NonFiniteError
from slimgrad.bytelm import generate, sample, stream, train
from slimgrad.models import Performer
from slimgrad.sweep import tree
from tests.bytelm.settings import TEXT, TINY_MODEL, corpus, tiny


@pytest.mark.parametrize("normalize", [False, True])
def test_greedy_generation_equals_running_the_whole_prefix_again(normalize: bool) -> None:
    torch.manual_seed(0)
    shape = TINY_MODEL if not normalize else dataclasses.replace(TINY_MODEL, normalize=True)
    model = Performer(shape)
    so_far = list(b"pr")
    with torch.no_grad():
        for _ in range(60):
            logits, _ = model(torch.tensor([so_far]), model.initial_state(1))
            so_far.append(int(logits[0, -1].argmax()))
    assert generate(model, b"pr", 60) == bytes(so_far[2:])


def test_the_state_keeps_its_size() -> None:
    model = Performer(TINY_MODEL)
    _, state = model(TEXT[None, :500], model.initial_state(1))
    sizes = [[leaf.nbytes for leaf in tree.tensors(s)] for s in (state, model.initial_state(1))]
    assert sizes[0] == sizes[1]


def test_a_trained_model_goes_on_as_its_text_does() -> None:
    text = generate(train(tiny(steps=45), corpus()).model, b"the quick brown fox ", 24)
    assert text == b"jumps over the lazy dog."


def test_the_seed_decides_what_is_drawn() -> None:
    model = Performer(TINY_MODEL)
    drawn = [generate(model, b"a", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20


def test_a_model_that_diverged_is_said_so() -> None:
    model = Performer(TINY_MODEL)
    torch.nn.init.constant_(model.head.bias, float("inf"))
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match="the model diverged"):
            generate(model, b"a", 1, temperature=temperature)


def test_bad_arguments_are_refused() -> None:
    model = Performer(TINY_MODEL)
    with pytest.raises(InputError, match="expected at least one byte"):
        generate(model, b"", 3)
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}):
        ((name, value),) = wrong.items()
        with pytest.raises(InputError, match=f"{name}={value}: expected"):
            stream(model, b"a", 3, **wrong)  # before the first byte is asked for
    with pytest.raises(InputError, match="num_bytes=-1"):
        stream(model, b"a", -1)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, {0}), (0.49, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_likeliest_bytes_that_have_the_probability(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    assert {sample._choose(logits, 1.0, top_p, generator) for _ in range(200)} == kept


def test_a_tiny_top_p_takes_the_likeliest_byte() -> None:
    model = Performer(TINY_MODEL)
    assert generate(model, b"ab", 20, temperature=1.0, top_p=1e-9) == generate(model, b"ab", 20)


def test_a_long_prompt_enters_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Performer(TINY_MODEL)
    prompt = bytes(TEXT[:100].tolist())
    whole = generate(model, prompt, 20)
    monkeypatch.setattr(sample, "_PREFILL_BYTES", 7)
    assert generate(model, prompt, 20) == whole
