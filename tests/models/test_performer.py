"""The Performer: the sizes that the paper states, one state whichever way it is reached, refusals that say why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from slimgrad import InputError
from slimgrad.bytelm.presets import PRESETS, get_preset
from slimgrad.models import Performer, PerformerConfig, shapes
from slimgrad.ops.feature_maps import FEATURE_MAPS
from slimgrad.ops.linear_attention import FORMS
from slimgrad.sweep import tree

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, pre-norm": {"norm": "pre"},
    "random features": {"feature_map": "favor", "features": 6},
    "taps": {"taps": 5},
    "modern": {
        "norm": "rms", "normalize": False, "output_projection": True, "taps": 4,
        "feature_map": "elu1",
    },
}  # fmt: skip


def variant(name: str) -> Performer:
    return Performer(PerformerConfig(layers=3, width=16, heads=2, vocabulary=19, **VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("time", [1, 3, 64, 131])
def test_advance_reaches_the_state_of_forward_in_every_bit(name: str, time: int) -> None:
    model = variant(name)
    start = model.initial_state(2)
    _, start = model(torch.randint(19, (2, 7)), start)
    tokens = torch.randint(19, (2, time))
    with torch.no_grad():
        _, there = model(tokens, start)
        alone = model.advance(tokens, start)
    got, expected = list(tree.leaves(alone)), list(tree.leaves(there))
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        a, b = (getattr(x, "value", x) for x in (a, b))
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_give_the_outputs_of_the_whole(name: str) -> None:
    model = variant(name).double()
    tokens = torch.randint(19, (2, 23))
    start = model.initial_state(2)
    whole, _ = model(tokens, start)
    state, pieces = start, []
    for piece in tokens.split([1, 2, 9, 11], dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-12)  # measured: 1e-14


@pytest.mark.parametrize("name", VARIANTS)
def test_a_later_token_never_moves_an_earlier_output(name: str) -> None:
    model = variant(name)
    tokens = torch.randint(19, (1, 20))
    other = tokens.clone()
    other[:, 12] = (tokens[:, 12] + 1) % 19
    start = model.initial_state(1)
    a, b = model(tokens, start)[0], model(other, start)[0]
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.equal(a[:, 12:], b[:, 12:])


def test_each_tap_sees_its_own_distance() -> None:
    model = Performer(PerformerConfig(layers=1, width=8, heads=1, vocabulary=5, taps=3))
    tokens = torch.tensor([[4, 1, 2]])
    x, following = model._begin(tokens, model.initial_state(1))
    tables = [model.embed.weight, *(table.weight for table in model.earlier)]
    expected = [tables[0][4], tables[0][1] + tables[1][4], tables[0][2] + tables[1][1] + tables[2][4]]
    torch.testing.assert_close(x[0, :, :4], torch.stack(expected))
    assert following["recent"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "length", "layers", "width"),
    [
        ("I", 8192, 1, 1024), ("II", 1024, 3, 512), ("III", 4096, 3, 1024), ("IV", 16384, 3, 1024),
        ("copying", 512, 1, 256), ("ptb", 1024, 3, 512), ("enwik8", 4096, 3, 1024),
    ],
)  # fmt: skip
def test_published_presets_have_the_sizes_of_the_paper(name: str, length: int, layers: int, width: int) -> None:
    preset = get_preset(name)
    model = preset.model
    assert (preset.length, model.layers, model.width, model.heads) == (length, layers, width, width // 64)
    assert (model.feedforward_width, model.num_features, model.vocabulary) == (4 * width, 64, 256)
    assert (model.feature_map, model.normalize) == ("square", True)
    assert (model.output_projection, model.taps) == (False, 1)
    assert model.norm == ("pre" if name == "copying" else "output")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Performer(model).parameters())
    attention, feedforward, norms = 3 * (width + 1) * width, 8 * width**2 + 5 * width, 4 * width
    assert parameters == layers * (attention + feedforward + norms) + 256 * width // 2 + (width + 1) * 256


def test_published_learning_rates() -> None:
    assert {name: PRESETS[name].learning_rate for name in ("ptb", "enwik8", "copying")} == {
        "ptb": 1e-4, "enwik8": 2e-4, "copying": 1e-2,
    }  # fmt: skip


def test_the_modern_state_is_sums_and_a_tail_of_tokens() -> None:
    preset = get_preset("modern")
    state = Performer(preset.model).initial_state(1)
    plain = list(tree.tensors(state))
    assert [leaf.shape for leaf in plain] == [(1, preset.model.taps - 1)] * (preset.model.taps > 1)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown preset 'V': expected one of I, II, III, IV, copying, ptb, enwik8"):
        get_preset("V")


def test_a_shape_knows_what_there_is_to_compute_with() -> None:
    assert list(shapes.FEATURE_MAPS) == list(FEATURE_MAPS)
    assert list(shapes.FORMS) == list(FORMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers=0, expected at least 1"),
        ({"width": 10, "heads": 3}, "width=10 is not a multiple of heads=3"),
        ({"width": 6, "heads": 1}, "multiple of 4, got 6"),
        ({"feature_map": "cube"}, "feature_map='cube', expected one of"),
        ({"form": "fast"}, "form='fast', expected 'auto' or one of"),
        ({"features": 5}, "only 'favor' can"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PerformerConfig(layers=1, width=16, heads=2), **change)
