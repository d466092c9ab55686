"""A model's file tells its shape, and another shape is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from slimgrad import InputError
from slimgrad.bytelm import RunFolder, build_model
from slimgrad.bytelm.model_file import read_shape
from slimgrad.bytelm.optimizer import make_optimizer
from slimgrad.models import Performer
from slimgrad.runs.tensors import save_tensors
from tests.bytelm.settings import TINY_MODEL, tiny


def test_a_model_of_another_shape_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    model = build_model(tiny())
    other = Performer(dataclasses.replace(TINY_MODEL, layers=3, norm="pre"))
    message = "another shape: layers 2 instead of 3, norm 'rms' instead of 'pre'"
    with RunFolder.create(tmp_path / "run", "fox", {"config": tiny().to_dict()}, model) as run:
        assert run.load(model, make_optimizer(tiny(), model)) == (0, 0)
        with pytest.raises(InputError, match=message):
            run.load(other, make_optimizer(tiny(), other))


def test_a_foreign_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="expected a safetensors file, got"):
        read_shape(tmp_path / "text")
    save_tensors(tmp_path / "foreign", {"x": torch.zeros(2)})
    with pytest.raises(InputError, match="expected a model that slimgrad wrote"):
        read_shape(tmp_path / "foreign")
    with pytest.raises(InputError, match="expected a safetensors file, found none"):
        read_shape(tmp_path / "absent")
