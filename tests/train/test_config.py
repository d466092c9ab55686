"""A run's numbers: refused where they make no sense, and the plan that follows from them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimgrad import InputError
from slimgrad.models import PRESETS, get_preset
from slimgrad.train import config_for
from tests.train.settings import tiny


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("length", 1, "at least 2"),
        ("chunk", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("validations", 0, "at least 1"),
        ("validation_bytes", 1, "at least 2"),
        ("first_length", 1, "0, or at least 2"),
        ("learning_rate", 0.0, "a positive number"),
        ("learning_rate", float("nan"), "a positive number"),
        ("clip_norm", float("inf"), "a positive number"),
        ("weight_decay", -0.1, "zero or more"),
        ("warmup", 1.5, "a fraction between 0 and 1"),
        ("betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("seed", -1, "between 0"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=rf"{field}=.*: expected {expected}"):
        tiny(**{field: value})


def test_lengths_double_with_equal_shares_of_the_bytes() -> None:
    lengths = tiny(first_length=64, length=1024, steps=310).step_lengths()
    assert len(lengths) == 310
    assert lengths == sorted(lengths)
    assert {n: lengths.count(n) for n in set(lengths)} == {64: 160, 128: 80, 256: 40, 512: 20, 1024: 10}


@pytest.mark.parametrize(("first", "length", "steps"), [(0, 50, 3), (50, 50, 4), (80, 50, 2), (3, 50, 1), (7, 50, 9)])
def test_the_last_step_has_the_full_length(first: int, length: int, steps: int) -> None:
    lengths = tiny(first_length=first, length=length, steps=steps).step_lengths()
    assert len(lengths) == steps
    assert lengths[-1] == length
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_a_run_that_json_can_hold(name: str) -> None:
    config = config_for(get_preset(name), steps=7, length=None)
    assert (config.steps, config.length) == (7, PRESETS[name].length)
    assert json.loads(json.dumps(config.to_dict()))["model"]["width"] == PRESETS[name].model.width
