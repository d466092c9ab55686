"""Where a model computes, by name."""

from __future__ import annotations

import pytest
import torch

from slimgrad import InputError
from slimgrad.bytelm import pick_device


@pytest.mark.parametrize(("name", "has_gpu", "expected"), [("cpu", True, "cpu"), ("auto", False, "cpu"),
                                                           ("auto", True, "cuda"), ("cuda", True, "cuda")])  # fmt: skip
def test_auto_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, has_gpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert pick_device(name).type == expected


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device 'cuda': expected a GPU that torch can use, found none"):
        pick_device("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="device 'tpu': expected one of auto, cpu, cuda"):
        pick_device("tpu")
