"""A model is verified in another dtype than its own: what is cast along, and what casts inside."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from tests.verification.test_model import FLOATS, LSTM, TOKENS, WEIGHTS, Recurrence


def huber_of(weight: Tensor) -> Any:
    return lambda outputs, targets: (F.huber_loss(outputs, targets, reduction="none") @ weight).sum()


def weighted_by_default(outputs: Tensor, targets: Tensor, weight: Tensor = WEIGHTS) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), weight=weight, reduction="sum")


LOSSES = {
    "float targets": (nn.HuberLoss(reduction="sum"), FLOATS),
    "a module with a weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, reduction="sum"), FLOATS),
    "a closure over a tensor": (huber_of(WEIGHTS), FLOATS),
    "a closure over a module": (
        (lambda module: lambda outputs, targets: module(outputs, targets))(
            nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum")
        ),
        FLOATS.softmax(-1).transpose(1, 2).contiguous().transpose(1, 2),
    ),
    "a default": (weighted_by_default, TOKENS),
    "a partial": (partial(weighted_by_default, weight=WEIGHTS), TOKENS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_targets_and_what_a_loss_holds_are_cast_along(name: str) -> None:
    loss_fn, targets = LOSSES[name]
    if name == "a closure over a module":
        inner = loss_fn
        loss_fn = lambda outputs, goals: inner(outputs.flatten(0, 1), goals.flatten(0, 1))  # noqa: E731
    report = sg.verify(Recurrence(), TOKENS, targets, chunk=10, loss_fn=loss_fn)
    assert report.passed, report
    assert report.tolerance == 1e-9
    assert report.notes == ()
    assert max(report.loss_errors.values()) < 1e-12


def test_floating_context_is_cast_along() -> None:
    class WithContext(Recurrence):
        def forward(self, inputs: Tensor, state: Any, context: Any) -> tuple[Tensor, Any]:
            outputs, state = super().forward(inputs, state)
            return outputs * context["scale"], state

    report = sg.verify(WithContext(), TOKENS, context={"scale": torch.rand(13)}, chunk=10)
    assert report.passed, report
    assert report.notes == ()
    assert "context 0" in {f.name for f in report.findings}


class LossIsAMethod(Recurrence):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return loss + outputs.shape[1] * self.w.weight.square().sum()


def test_a_loss_that_is_a_method_of_the_model_goes_with_the_copy() -> None:
    model = LossIsAMethod()
    for loss_fn in (model.loss, lambda outputs, targets: model.loss(outputs, targets)):
        report = sg.verify(model, TOKENS, chunk=10, loss_fn=loss_fn)
        assert report.passed, report
        assert report.notes == ()
        assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_cannot_be_copied_is_verified_in_the_models_own_dtype() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), WEIGHTS, reduction="sum")

    report = sg.verify(Recurrence(), TOKENS, chunk=10, loss_fn=loss_fn)
    assert report.passed, report
    assert report.tolerance == 1e-4
    assert "in the model's own float32" in report.notes[0]


class FloatStart(Recurrence):
    """The initial state of every tutorial: zeros in the default dtype, whatever the model's is."""

    explicit = False

    def initial_state(self, batch_size: int) -> Any:
        return torch.zeros(batch_size, 6, dtype=torch.float32 if self.explicit else None)


@pytest.mark.parametrize("explicit", [False, True])
def test_an_initial_state_of_float32_zeros_is_cast_along(explicit: bool) -> None:
    for model in (FloatStart(), LSTM()):
        model.explicit = explicit
        report = sg.verify(model, TOKENS, chunk=10)
        assert report.passed, report
        assert report.tolerance == 1e-9
        assert torch.get_default_dtype() == torch.float32


def test_a_table_that_is_no_buffer_is_cast_along() -> None:
    class Table(Recurrence):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.linspace(-1, 1, 36).reshape(6, 6)

        def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, h = self.roll(self.embed(inputs) @ self.table, state)
            return self.head(y), h

    model = Table()
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report
    assert report.notes == ()
    assert model.table.dtype == torch.float32


class CastsInside(Recurrence):
    """Sums in float32, as in many published models: where they are cut shows in the last bits of these."""

    cut = False

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        x = torch.tanh(self.w(self.embed(inputs)))
        sums = state[:, None] + x.float().cumsum(1).to(x.dtype)
        return self.head(sums), sums[:, -1].detach() if self.cut else sums[:, -1].clone()


def test_a_cast_inside_the_model_is_reported_and_judged_by_its_own_tolerance() -> None:
    model = CastsInside()
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report
    assert 1e-9 < max(f.error for f in report.findings) < 1e-5
    assert report.tolerance == 1e-4
    assert "the model computes in float32 inside (CastsInside)" in report.notes[0]
    assert report.notes[0] in str(report)
    model.cut = True
    assert not sg.verify(model, TOKENS, chunk=10).passed
