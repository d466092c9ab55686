"""`verify` passes what is exact, says what is not and where, and leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.sweep.carriers import SumCarrier
from tests.contract.cases import signals
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

TOKENS = torch.arange(2 * 47).reshape(2, 47) * 7 % 13


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", [AllKinds, CachedAttention, GatedRecurrence, LinearAttention])
def test_exact_models_pass(model_type: type[nn.Module], training: bool) -> None:
    report = sg.verify(model_type().train(training), TOKENS, chunk=10)
    assert report.passed, report
    assert str(report).startswith(f"exact: {model_type.__name__}, chunks of 10 in 47 tokens, float64")
    assert max(finding.error for finding in report.findings) < 1e-12
    assert {finding.check for finding in report.findings} == {"sweep", "step"}


def test_floating_inputs_and_lists_and_context_are_compared() -> None:
    model, inputs, targets = signals()
    report = sg.verify(model, inputs, targets, chunk=20)
    assert report.passed, report
    assert {"input 0", "input 1", "initial state 0", "initial state 1"} <= {f.name for f in report.findings}
    assert sg.verify(GatedRecurrence(), [TOKENS, TOKENS[:, :13]], chunk=5).passed


def test_dropout_is_compared_draw_by_draw() -> None:
    model = AllKinds(dropout=0.4).train()
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report


class EdgeModel(GatedRecurrence):
    """Its first token of every call sees no embedding of its own: right in one call, wrong at chunk edges."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        x = self.embed(inputs)
        shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)  # forgets the token before the chunk
        outputs, state = super().forward(inputs, state)
        return outputs + self.head(shifted), state


def test_a_step_that_depends_on_the_cut_fails_step_only() -> None:
    report = sg.verify(EdgeModel(), TOKENS, chunk=10)
    assert not report.passed
    assert report.global_errors["sweep"] < 1e-12
    assert report.global_errors["step"] > 1e-3
    assert report.worst.check == "step"
    assert "NOT EXACT" in str(report)
    assert sg.verify(EdgeModel(), TOKENS, chunk=100).passed  # one chunk has no edges


def test_a_broken_sweep_fails_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SumCarrier, "roots", lambda self: [])
    report = sg.verify(LinearAttention(), TOKENS, chunk=10)
    assert not report.passed
    assert report.global_errors["sweep"] > 1e-3
    assert {f.name for f in report.findings if f.check == "sweep" and f.error > 1e-3} >= {"embed.weight", "qkv.weight"}


def test_float32_and_bfloat16_have_wider_tolerances() -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        report = sg.verify(LinearAttention(), TOKENS, chunk=10, dtype=dtype)
        assert report.tolerance == tolerance
        assert report.passed, report
        assert str(dtype).removeprefix("torch.") in report.setting


def test_a_nan_does_not_pass() -> None:
    model = GatedRecurrence()
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    report = sg.verify(model, TOKENS, chunk=10)
    assert not report.passed
    assert report.worst.error != report.worst.error


def test_verify_leaves_no_trace() -> None:
    model = AllKinds(dropout=0.3).train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sg.verify(model, TOKENS, chunk=10)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert model.dropout.training
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
