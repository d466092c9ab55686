"""Generation from the recurrent state is generation from the whole prefix, and its state does not grow."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slimgrad import InputError
from slimgrad.models import Performer
from slimgrad.sweep import tree
from slimgrad.train import generate, train
from tests.train.settings import TEXT, TINY_MODEL, tiny


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
    text = generate(train(tiny(steps=60), TEXT).model, b"the quick brown fox ", 24)
    assert text == b"jumps over the lazy dog."


def test_the_seed_decides_what_is_drawn() -> None:
    model = Performer(TINY_MODEL)
    drawn = [generate(model, b"a", 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20


def test_bad_arguments_are_refused() -> None:
    model = Performer(TINY_MODEL)
    with pytest.raises(InputError, match="expected at least one byte"):
        generate(model, b"", 3)
    with pytest.raises(InputError, match="temperature=-1"):
        generate(model, b"a", 3, temperature=-1)
