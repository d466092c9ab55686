"""What cannot be copied is verified in place."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import slimgrad as sg
from tests.verification.test_model import TOKENS, OnInputs, Recurrence


def hook_made() -> nn.Module:
    model = Recurrence()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.w)
    return model


def with_a_lock() -> nn.Module:
    model = Recurrence()
    model.lock = threading.Lock()
    return model


def with_a_kept_activation() -> nn.Module:
    model = Recurrence()
    model.head.register_forward_hook(lambda module, _, outputs: None)
    model.kept = model.embed(TOKENS)
    return model


def replaced_forward() -> nn.Module:
    model = Recurrence()
    original = model.forward
    model.forward = lambda inputs, state: original(inputs, state)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [hook_made, with_a_lock, with_a_kept_activation, replaced_forward])
def test_what_cannot_be_copied_is_verified_in_place(build: Any, dtype: torch.dtype) -> None:
    model = build().to(dtype).train()
    model.register_buffer("untouched", torch.ones(2))
    model.head.eval()
    gradients = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
        p.register_post_accumulate_grad_hook(lambda p: p.data.add_(1))  # an optimiser that steps in the hook
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, rng = dict(vars(model)), torch.get_rng_state()
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report
    assert len(report.notes) == 1
    assert f"verified in place, in the model's own {str(dtype)[6:]}" in report.notes[0]
    assert report.tolerance == {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, torch.ones_like(g)) for g in gradients)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model).keys() == attributes.keys()
    assert all(vars(model)[name] is value for name, value in attributes.items())
    assert (model.training, model.head.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_cut_is_found_in_place() -> None:
    model = OnInputs()
    model.cut, model.lock = True, threading.Lock()
    report = sg.verify(model, torch.randn(2, 47, 6), TOKENS, chunk=10)
    assert not report.passed
    assert report.global_errors["step"] > 0.1
