"""A run's numbers: refused where they make no sense, and the plan that follows from them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from slimgrad import InputError
from slimgrad.bytelm import TrainConfig, with_settings
from slimgrad.bytelm.presets import PRESETS, get_preset
from tests.bytelm.settings import tiny


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("length", 1, "at least 2"),
        ("chunk", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("eval_every", 0, "at least 1"),
        ("save_every", 0, "at least 1"),
        ("batch", 0, "at least 1"),
        ("accumulate", 0, "at least 1"),
        ("method", "fast", "one of chunked, checkpoint, plain"),
        ("windows", "odd", "one of shuffled, consecutive, random, documents"),
        ("precision", "fp8", "one of float32, bf16"),
        ("device", "tpu", "one of auto, cpu, cuda"),
        ("decay", "never", "one of cosine, linear, constant, drop"),
        ("validation_bytes", 1, "at least 2"),
        ("first_length", 1, "0, or at least 2"),
        ("learning_rate", 0.0, "a positive number"),
        ("learning_rate", float("nan"), "a positive number"),
        ("clip_norm", float("inf"), "a positive number, or none"),
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


@pytest.mark.parametrize("changes", [{"windows": "documents"}, {"task": "copying", "length": 64, "first_length": 8}])
def test_documents_and_copying_count_every_step_alike(changes: dict[str, Any]) -> None:
    config = tiny(steps=5, **changes)
    assert config.step_lengths() == [config.length] * 5


@pytest.mark.parametrize(("length", "windows"), [(63, "shuffled"), (2, "shuffled"), (64, "documents")])
def test_copying_needs_an_even_length_and_no_documents(length: int, windows: str) -> None:
    with pytest.raises(InputError, match="an even number of at least 4 for copying"):
        tiny(task="copying", length=length, windows=windows)


def test_settings_reach_every_field_by_its_name() -> None:
    config = with_settings(
        tiny(), ["clip_norm=none", "betas=[0.5, 0.75]", "decay=constant", "model.width=32", "model.feature_map=square"]
    )
    assert (config.clip_norm, config.betas, config.decay) == (None, (0.5, 0.75), "constant")
    assert (config.model.width, config.model.feature_map) == (32, "square")
    assert with_settings(tiny(), []) == tiny()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warmup", "--set warmup: expected NAME=VALUE with one of the names task, format"),
        ("speed=3", "--set speed=3: expected NAME=VALUE with one of the names"),
        ("model=3", "--set model=3: expected NAME=VALUE"),
        ("model.depth=3", "--set model.depth=3: expected model.NAME=VALUE with one of"),
        ("warmup=long", "configuration: warmup: Input should be a valid number"),
        ("warmup=2", "warmup=2.0: expected a fraction between 0 and 1"),
        ("model.norm=odd", "configuration: model.norm: Input should be 'output', 'pre' or 'rms'"),
        ("model.width=wide", "configuration: model.width: Input should be a valid integer"),
        ("windows=3", "windows=3: expected one of shuffled, consecutive, random, documents"),
        ("clip_norm=0", "clip_norm=0.0: expected a positive number, or none"),
        ("betas=[0.9, 1]", "betas=[0.9, 1]: expected two numbers in [0, 1)"),
        ("model.heads=3", "width=16 is not a multiple of heads=3"),
        ("schedule=often", "schedule 'often': expected one of auto, rebuild"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        with_settings(tiny(), [setting])


def test_a_saved_configuration_with_a_field_that_is_unknown_is_refused() -> None:
    with pytest.raises(InputError, match="unknown fields speed"):
        TrainConfig.from_dict(tiny().to_dict() | {"speed": 3})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_a_run_that_json_can_hold(name: str) -> None:
    config = get_preset(name).replace(steps=7, length=None)
    assert (config.steps, config.length) == (7, PRESETS[name].length)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
