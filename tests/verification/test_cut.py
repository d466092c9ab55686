"""`verify` claims nothing of chunks where nothing was cut, and reports where a model is hard to run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.cli import checking
from slimgrad.sweep.cut import Cut
from slimgrad.verification import model as verification
from slimgrad.verification.model import chosen_chunk
from tests.toy_models import GatedRecurrence


def tokens(time: int) -> Tensor:
    return torch.arange(2 * time).reshape(2, time) * 7 % 13


class LooksAhead(GatedRecurrence):
    """Not causal: each step sees the call's tokens from the other end."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        return outputs + self.head(self.embed(inputs).flip(1)), following


class Detached(GatedRecurrence):
    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        return outputs, {**following, "h": following["h"].detach()}


@pytest.mark.parametrize("time", range(2, 200))
def test_a_chunk_that_cuts(time: int) -> None:
    cut = Cut(time, chosen_chunk(time))
    assert len(cut) >= min(time, 3)
    assert cut.chunk <= 64
    ragged = any(time % size and len(Cut(time, size)) >= 3 for size in range(1, 65))
    assert bool(time % cut.chunk) is ragged
    assert Cut(time, 64) != cut or len(cut) >= 3


@pytest.mark.parametrize("time", [3, 12, 40, 64, 65, 66, 128])
@pytest.mark.parametrize("model_type", [LooksAhead, Detached])
def test_what_cannot_be_cut_is_found_at_every_length(model_type: type[nn.Module], time: int) -> None:
    torch.manual_seed(0)
    report = sg.verify(model_type(), tokens(time))
    assert not report.passed
    assert str(report).startswith(f"NOT EXACT: {model_type.__name__}, chunks of {chosen_chunk(time)} in {time} tokens")
    assert sg.verify(GatedRecurrence(), tokens(time)).passed


def test_the_longest_of_a_list_is_cut() -> None:
    assert not sg.verify(Detached(), [tokens(5), tokens(40)[0], tokens(7)]).passed
    assert sg.verify(GatedRecurrence(), [tokens(5), tokens(40)[0], tokens(7)]).passed


@pytest.mark.parametrize(("time", "chunk"), [(40, 40), (40, 64), (40, 39), (1, None), (1, 8)])
def test_one_chunk_proves_nothing(time: int, chunk: int | None) -> None:
    report = sg.verify(Detached(), tokens(time), chunk=chunk)
    assert not report.passed
    assert not report.was_cut
    one = "1 token in one chunk" if time == 1 else "40 tokens in one chunk"
    assert str(report).startswith(f"NOTHING WAS CUT: Detached, {one}, float64")
    instead = "Pass a longer sequence$" if time == 1 else r"Pass a longer sequence, or chunk=19$"
    with pytest.raises(AssertionError, match=f"nothing was cut, so that nothing is known of chunks.*{instead}"):
        raise AssertionError(report.notes[-1])


def test_the_command_cuts_a_short_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    assert checking.run_verification("modern", length=20, chunk=None, dtype=None)
    assert "chunks of 9 in 20 tokens" in capsys.readouterr().out
    assert not checking.run_verification("modern", length=20, chunk=30, dtype=None)
    assert "NOTHING WAS CUT" in capsys.readouterr().out


class Hooked(LooksAhead):
    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        outputs.register_hook(lambda gradient: gradient)
        return outputs, following


class Differentiates(GatedRecurrence):
    """Sees, at each step, what comes after it in the call: by a gradient that it takes itself."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        x = self.embed(inputs)
        (slope,) = torch.autograd.grad(x.cumsum(1).square().sum(), x, create_graph=True)
        return outputs + self.head(slope), following


def hooked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs.register_hook(lambda gradient: gradient)
    return F.cross_entropy(outputs.transpose(1, 2), targets)


@pytest.mark.parametrize("model_type", [Hooked, Differentiates])
def test_a_model_that_needs_gradients_gets_its_report(model_type: type[nn.Module]) -> None:
    report = sg.verify(model_type(), tokens(40), chunk=9)
    assert not report.passed
    assert report.notes == ()


def test_a_loss_that_needs_gradients_gets_its_report() -> None:
    report = sg.verify(GatedRecurrence(), tokens(40), chunk=9, loss_fn=hooked_mean)
    assert not report.passed
    assert "your loss_fn looks like a mean over the chunk" in report.notes[0]


def test_a_run_more_that_fails_leaves_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(subject: Any) -> list[str]:
        raise RuntimeError("no more runs")

    monkeypatch.setattr(verification, "draws_in_eval_mode", fails)
    report = sg.verify(Detached(), tokens(40))
    assert not report.passed
    assert report.notes == ("why was not looked for, as one run more did not go through (RuntimeError: no more runs)",)


class Noisy(GatedRecurrence):
    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        return F.dropout(outputs, 0.3), following


def noisy_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.dropout(outputs, 0.3).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("training", [False, True])
def test_noise_in_eval_mode_is_named(training: bool) -> None:
    report = sg.verify(Noisy().train(training), tokens(40), chunk=9)
    assert not report.passed
    assert report.global_errors["sweep"] < 1e-12
    assert "the model draws random numbers in eval mode too" in report.notes[0]
    report = sg.verify(GatedRecurrence().train(training), tokens(40), chunk=9, loss_fn=noisy_sum)
    assert not report.passed
    assert "loss_fn draws random numbers in eval mode too" in report.notes[0]
    report = sg.verify(Detached(dropout=0.3).train(training), tokens(40), chunk=9)  # a module asks for the mode
    assert report.notes == ()


@pytest.mark.parametrize("exact", [True, False])
def test_targets_that_a_loss_writes_to_stay_the_callers(exact: bool) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets.add_(1)).square().sum()

    targets = torch.linspace(0, 1, 2 * 40 * 13, dtype=torch.float64).reshape(2, 40, 13)
    before = targets.clone()
    report = sg.verify(GatedRecurrence() if exact else Detached(), tokens(40), targets, chunk=9, loss_fn=loss_fn)
    assert report.passed is exact
    assert report.notes == ()
    assert torch.equal(targets, before)
