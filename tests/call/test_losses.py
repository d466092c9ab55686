"""Targets of every integer type count as the loss counts them; a loss without a gradient is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.bytelm.loop import loss_and_accuracy
from slimgrad.call import losses
from slimgrad.call.losses import count_targets, cross_entropy_sum
from tests.toy_models import GatedRecurrence

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
WRAPPED = {torch.uint8: 156, torch.uint16: 65436}  # what -100 would be: a class like any other
TYPES = [*WRAPPED, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


def model_and_targets(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Every fourth target is ignored, or what an ignored one would wrap to, where the type has no -100."""
    torch.manual_seed(0)
    targets = TOKENS[:, :12] % 2
    targets[:, ::4] = 0 if dtype == torch.bool else WRAPPED.get(dtype, -100 if dtype.is_signed else 7)
    classes = WRAPPED.get(dtype, 12) + 1
    return GatedRecurrence(vocabulary=classes, width=2).double(), targets.to(dtype)


def plain(model: nn.Module, targets: Tensor) -> tuple[Tensor, int, tuple[Tensor, ...]]:
    """Loss, count and gradients by autograd over the whole sequence, with the targets widened first."""
    outputs, _ = model(TOKENS[:, :12], model.initial_state(2))
    count = int((targets.long() != -100).sum())
    loss = F.cross_entropy(outputs.flatten(0, 1), targets.long().flatten(), ignore_index=-100)
    return loss.detach(), count, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("way", ["backward", "loss", "Chunked"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_targets_of_every_integer_type(dtype: torch.dtype, way: str) -> None:
    check_type(dtype, way)


def check_type(dtype: torch.dtype, way: str) -> None:
    model, targets = model_and_targets(dtype)
    expected_loss, count, expected = plain(model, targets)
    assert count_targets(targets, 2, 12) == count
    if way == "backward":
        loss = sg.backward(model, TOKENS[:, :12], targets, chunk=5).loss
    else:
        loss = (sg.loss if way == "loss" else lambda m, *a, chunk: sg.Chunked(m, chunk=chunk)(*a))(
            model, TOKENS[:, :12], targets, chunk=5
        )
        loss.backward()
    # measured: at most 4e-16
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-14, atol=0)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert float((p.grad - g).norm()) <= 1e-14 * float(g.norm())


def test_a_comparison_in_the_targets_own_type_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "is_counted", lambda targets: targets != -100)
    for dtype in WRAPPED:
        with pytest.raises(AssertionError):
            check_type(dtype, "backward")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_evaluate_and_lists_count_alike(dtype: torch.dtype) -> None:
    model, targets = model_and_targets(dtype)
    count = plain(model, targets)[1]
    assert sg.evaluate(model, TOKENS[:, :12], targets, chunk=5).num_targets == count
    assert sg.evaluate(model, [TOKENS[:, :12]] * 2, [targets] * 2, chunk=5).num_targets == 2 * count


def test_accuracy_counts_what_the_loss_counts() -> None:
    logits = torch.zeros(1, 3, 157)
    logits[..., 156] = 1
    right = loss_and_accuracy(logits, torch.tensor([[156, 156, 1]], dtype=torch.uint8))["right"]
    assert int(right) == 2


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) != targets).sum()


REFUSED: list[tuple[str, Callable[[Tensor, Tensor], Any], str]] = [
    ("a count", errors, r"an integer tensor, which has no gradient; expected a floating one, got torch\.int64"),
    ("a count in a dict", lambda o, t: {"loss": errors(o, t)}, "an integer tensor, which has no gradient"),
    ("a flag", lambda o, t: (o > 0).any(), r"an integer tensor, which has no gradient; .*torch\.bool"),
    ("complex", lambda o, t: o.sum() * 1j, "a complex tensor, which has no gradient"),
    ("detached", lambda o, t: cross_entropy_sum(o.detach(), t), "a loss without a graph for tokens .*would be lost"),
    ("made anew", lambda o, t: torch.tensor(cross_entropy_sum(o, t).item()), "a loss without a graph for tokens"),
    ("a count of floats", lambda o, t: errors(o, t).double(), "a loss without a graph for tokens"),
    ("NaN", lambda o, t: torch.tensor(float("nan")), "a loss without a graph for tokens"),
]


@pytest.mark.parametrize(("loss_fn", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_loss_without_a_gradient_is_refused(loss_fn: Callable, message: str) -> None:
    model = GatedRecurrence()
    for way in (sg.backward, sg.loss):
        with pytest.raises(sg.InputError, match=message):
            way(model, TOKENS, chunk=7, loss_fn=loss_fn)
    assert all(p.grad is None for p in model.parameters())
    sg.backward(model, TOKENS, chunk=7)
    assert all(p.grad is not None for p in model.parameters())


def test_token_losses_without_a_gradient_are_refused() -> None:
    with pytest.raises(sg.InputError, match="a loss without a graph for tokens 0 to 6"):
        sg.token_loss(GatedRecurrence(), TOKENS, chunk=7, loss_fn=lambda o, t: o.detach().sum(-1))
    with pytest.raises(sg.InputError, match="an integer tensor"):
        sg.token_loss(GatedRecurrence(), TOKENS, chunk=7, loss_fn=lambda o, t: o.argmax(-1))


def test_a_count_is_no_loss_in_evaluate_either() -> None:
    """Its mean would be rounded to a whole number."""
    model = GatedRecurrence()
    with pytest.raises(sg.InputError, match="an integer tensor"):
        sg.evaluate(model, TOKENS, chunk=7, loss_fn=errors)
    found = sg.evaluate(model, TOKENS, chunk=7, loss_fn=lambda o, t: errors(o, t).double()).loss
    outputs, _ = model(TOKENS, model.initial_state(2))
    expected = errors(outputs, F.pad(TOKENS[:, 1:], (0, 1), value=-100))
    assert float(found) * 78 == pytest.approx(int(expected))


@pytest.mark.parametrize("way", [sg.backward, sg.loss])
def test_chunks_left_out_with_a_constant_zero(way: Callable) -> None:
    """As a mask over whole chunks does: the others' gradient is what plain backpropagation gives."""
    torch.manual_seed(0)
    model = GatedRecurrence().double()
    targets = TOKENS.clone()
    targets[:, :14] = targets[:, 35:] = -100  # the first two chunks, and the last

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(()) if (targets == -100).all() else cross_entropy_sum(outputs, targets)

    result = way(model, TOKENS, targets, chunk=7, loss_fn=loss_fn)
    if way is sg.loss:
        result.backward()
    outputs, _ = model(TOKENS, model.initial_state(2))
    loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100)
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert float((p.grad - g).norm()) <= 1e-14 * float(g.norm())  # measured: 3e-16


def test_a_loss_that_only_the_state_can_move() -> None:
    """Frozen but for the initial state: in the first sweep no output has a graph, and no loss."""
    model = GatedRecurrence().requires_grad_(False)
    model.start.requires_grad_()
    sg.loss(model, TOKENS, chunk=7).backward()
    assert float(model.start.grad.norm()) > 0
