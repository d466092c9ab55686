"""The device of these tests, and models and inputs on it.

`SLIMGRAD_TEST_DEVICE=cpu` runs them without CUDA: what a CPU cannot show is then left out, by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig
from tests.contract.cases import CASES, VOCABULARY, Built, next_token

DEVICE = torch.device(os.environ.get("SLIMGRAD_TEST_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"
on_cuda_only = pytest.mark.skipif(not IS_CUDA, reason="shows on CUDA only")


def performer() -> nn.Module:
    return Performer(PerformerConfig(layers=2, width=16, heads=2, vocabulary=VOCABULARY))


MODELS: dict[str, Callable[[], Built]] = {**dict(CASES), "performer": next_token(performer)}
every_model = pytest.mark.parametrize("name", MODELS)
SCHEDULES: dict[str, Callable[..., sg.Schedule]] = {
    "Rebuild": sg.Rebuild,
    "Keep": sg.Keep,
    "Every": partial(sg.Every, 4),
    "Binomial": partial(sg.Binomial, 3),
}
PLACES = ("device", "host", "disk")


def moved(x: Any) -> Any:
    """The tree's tensors on the device."""
    return pytree.tree_map(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, x)


def on_device(build: Callable[[], Built]) -> Callable[[], Built]:
    """The same model and numbers, on the device."""

    def built() -> Built:
        model, inputs, targets = build()
        return model.to(DEVICE), moved(inputs), moved(targets)

    return built


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Every parameter's gradient, taken off the model."""
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def different(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> list[str]:
    """The names of what is not the same in every bit."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return torch.equal(a, b) if a is not None and b is not None else a is b

    return [name for name in expected if not same(got[name], expected[name])]


class _TorchOnDevice:
    """`torch`, for models that say no device: what they make is made on this one."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return partial(found, device=DEVICE) if name in ("arange", "full", "tensor", "zeros") else found


def place_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy models make positions and counters with no word of a device; on CUDA they belong there."""
    from tests import toy_models
    from tests.states import test_complex_states

    for module in (toy_models, test_complex_states):
        monkeypatch.setattr(module, "torch", _TorchOnDevice())
