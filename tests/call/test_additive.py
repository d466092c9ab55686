"""A loss that does not add up over tokens is refused, however it is written; a right sum never is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.call.additive import SumCheck
from slimgrad.call.losses import is_mean_over_time
from tests.toy_models import GatedRecurrence

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
VALUES = torch.linspace(-1, 2, 2 * 40 * 13, dtype=torch.float64).reshape(2, 40, 13).sin()
LABELS = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
MASK = torch.arange(2 * 40).reshape(2, 40) % 3 != 1
CHANCES = VALUES.softmax(-1)
Loss = Callable[[Tensor, Any], Any]


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square()


MEANS: dict[str, tuple[Loss, Any]] = {
    "[B, C, T]": (lambda y, t: F.cross_entropy(y.transpose(1, 2), t), LABELS),
    "nll of [B, C, T]": (lambda y, t: F.nll_loss(y.log_softmax(-1).transpose(1, 2), t), LABELS),
    "nll": (lambda y, t: F.nll_loss(y.log_softmax(-1).flatten(0, 1), t.flatten()), LABELS),
    "label smoothing": (lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten(), label_smoothing=0.1), LABELS),
    "chances": (lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten(0, 1)), CHANCES),
    "over a number": (lambda y, t: F.mse_loss(y, t) / 4, VALUES),
    "and more": (lambda y, t: F.mse_loss(y, t) + 1e-3 * y.square().mean(), VALUES),
    "a sum and a mean": (lambda y, t: errors(y, t).sum() + y.square().mean(), VALUES),
    "nothing more": (lambda y, t: F.mse_loss(y, t) + 0, VALUES),
    "another type": (lambda y, t: F.mse_loss(y, t).float(), VALUES),
    "transposed": (lambda y, t: errors(y, t).transpose(1, 2).mean(), VALUES),
    "flat": (lambda y, t: errors(y, t).flatten().mean(), VALUES),
    "in turn": (lambda y, t: errors(y, t).mean((1, 2)).sum(), VALUES),
    "a root": (lambda y, t: errors(y, t).sum().sqrt(), VALUES),
    "masked": (lambda y, t: (errors(y, t[0]) * t[1][..., None]).sum() / t[1].sum(), (VALUES, MASK)),
    "masked, never by zero": (lambda y, t: errors(y, t[0])[t[1]].sum() / t[1].sum().clamp(min=1), (VALUES, MASK)),
    "in a dict": (lambda y, t: {"loss": F.mse_loss(y, t)}, VALUES),
    "a spread": (lambda y, t: (y - y.mean(1, keepdim=True)).square().sum(), VALUES),
    "neighbours": (lambda y, t: (y[:, 1:] - y[:, :-1]).square().sum(), VALUES),
    "the last step": (lambda y, t: errors(y[:, -1], t[:, -1]).sum(), VALUES),
    "without the first": (lambda y, t: errors(y, t)[:, 3:].sum(), VALUES),
    "shifted": (lambda y, t: errors(y[:, :-1], t[:, 1:]).sum(), VALUES),
    "shifted labels": (lambda y, t: F.cross_entropy(y[:, :-1].flatten(0, 1), t[:, 1:].flatten()), LABELS),
    "discounted": (lambda y, t: (errors(y, t) * 0.9 ** torch.arange(y.shape[1])[:, None]).sum(), VALUES),
    "a temporal difference": (lambda y, t: (y[:, :-1] - t[:, :-1] - 0.9 * y[:, 1:]).square().sum(), VALUES),
    "added up along time": (lambda y, t: errors(y, t).cumsum(1).sum(), VALUES),
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return GatedRecurrence().double()


@pytest.mark.parametrize("name", MEANS)
def test_what_does_not_add_up_is_refused(model: nn.Module, name: str) -> None:
    loss_fn, targets = MEANS[name]
    refused = "(returned the mean over its chunk; expected the sum|does not add up over tokens)"
    for way in (sg.backward, sg.loss, sg.evaluate):
        with pytest.raises(sg.InputError, match=refused):
            way(model, TOKENS, targets, chunk=9, loss_fn=loss_fn)
    with pytest.raises(sg.InputError, match=f"{refused}.* as the whole is one chunk here, normalizer=1"):
        sg.backward(model, TOKENS, targets, chunk=40, loss_fn=loss_fn)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["[B, C, T]", "masked", "a root"])
def test_a_mean_of_one_chunk_that_nobody_divides_again_is_right(model: nn.Module, name: str) -> None:
    loss_fn, targets = MEANS[name]
    agrees(model, targets, loss_fn, chunk=40)


def agrees(model: nn.Module, targets: Any, loss_fn: Loss, chunk: int) -> None:
    """Loss and gradients against plain backpropagation over the whole."""
    model.zero_grad()
    result = sg.backward(model, TOKENS, targets, chunk=chunk, loss_fn=loss_fn, normalizer=1)
    outputs, _ = model(TOKENS, model.initial_state(2))
    loss = loss_fn(outputs, targets)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-13, atol=1e-13)
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert float((p.grad - g).norm()) <= 1e-13 * float(g.norm())  # measured: at most 9e-16


WEIGHT = torch.linspace(0.2, 1.3, 13)
SUMS: dict[str, tuple[Loss, Any]] = {
    "over time, a mean over 8 channels": (lambda y, t: y[..., :8].tanh().sum(1).mean(), VALUES),
    "a mean over the batch": (lambda y, t: errors(y, t).sum((1, 2)).mean(), VALUES),
    "a mean over channels": (lambda y, t: errors(y, t).mean(-1).sum(), VALUES),
    "divergence": (lambda y, t: F.kl_div(y.log_softmax(-1), t, reduction="batchmean"), CHANCES),
    "[B, C, T]": (lambda y, t: F.cross_entropy(y.transpose(1, 2), t, reduction="sum"), LABELS),
    "in float32": (lambda y, t: F.cross_entropy(y.float().transpose(1, 2), t, reduction="sum").double(), LABELS),
    "of terms that cancel": (lambda y, t: (y * t).sum(), VALUES - VALUES.mean()),
    "by a constant": (lambda y, t: errors(y, t).sum() / 1000 * 3 + 0, VALUES),
    "no target but few": (
        lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten(), reduction="sum"),
        torch.where(torch.arange(40) % 13 == 4, LABELS, -100),
    ),
    "masked": (lambda y, t: (errors(y, t[0]) * t[1][..., None]).sum(), (VALUES, MASK & (torch.arange(40) > 30))),
    "with metrics": (lambda y, t: {"loss": errors(y, t).sum(), "by class": errors(y, t).sum((0, 1))}, VALUES),
    "for pairs": (lambda y, t: y.unflatten(1, (-1, 2)).mean(2).square().sum(), VALUES),
}


@pytest.mark.parametrize("chunk", [8, 14, 40])
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_not_refused(model: nn.Module, name: str, chunk: int) -> None:
    loss_fn, targets = SUMS[name]
    if name == "in float32":  # rounded by float32, in which chunks add up to other bits
        sg.backward(model, TOKENS, targets, chunk=chunk, loss_fn=loss_fn)
    else:
        agrees(model, targets, loss_fn, chunk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_takes_no_float64_is_asked_in_its_own_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, weight = GatedRecurrence().to(dtype), WEIGHT.to(dtype)
    for reduction in ("sum", "mean"):

        def loss_fn(outputs: Tensor, targets: Tensor, reduction: str = reduction) -> Tensor:
            return F.cross_entropy(outputs.transpose(1, 2), targets, weight=weight, reduction=reduction)

        if reduction == "sum":
            sg.backward(model, TOKENS, LABELS, chunk=9, loss_fn=loss_fn)
        else:
            with pytest.raises(sg.InputError, match="the mean over its chunk"):
                sg.backward(model, TOKENS, LABELS, chunk=9, loss_fn=loss_fn)


def test_a_small_part_is_seen_beside_sixteen_bits() -> None:
    """In bfloat16 a part of three hundredths is rounding; asked in float64, it is not."""
    model, part = GatedRecurrence().bfloat16(), 3.0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum() + part * outputs.square().mean()

    with pytest.raises(sg.InputError, match="does not add up over tokens"):
        sg.backward(model, TOKENS, VALUES, chunk=9, loss_fn=loss_fn)
    part = 0.0
    sg.backward(model, TOKENS, VALUES, chunk=9, loss_fn=loss_fn)


def test_a_loss_that_draws_is_judged_by_its_graph(model: nn.Module) -> None:
    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        return errors(F.dropout(outputs, 0.5), targets).sum()

    def noisy_mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return errors(F.dropout(outputs, 0.5), targets).mean() / 4 + 0

    before = torch.get_rng_state()
    torch.manual_seed(3)
    sg.loss(model, TOKENS, VALUES, chunk=9, loss_fn=noisy).backward()
    assert not torch.equal(before, torch.get_rng_state())
    with pytest.raises(sg.InputError, match="the mean over its chunk"):
        sg.backward(model, TOKENS, VALUES, chunk=9, loss_fn=noisy_mean)


def test_asking_draws_nothing_and_asks_once(model: nn.Module) -> None:
    seen: list[int] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.shape[1])
        return errors(outputs, targets).sum()

    torch.manual_seed(5)
    sg.backward(model, TOKENS, chunk=9)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    sg.backward(model, TOKENS, VALUES, chunk=9, loss_fn=loss_fn)
    assert torch.equal(torch.get_rng_state(), expected)
    assert seen == [4, 4, 8, 4, 4, 2, 2, 9, 9, 9, 9]  # the last chunk first, then what is asked of its tokens


@pytest.mark.parametrize(("chunk", "options", "times"), [(1, {}, 40), (40, {"normalizer": 1}, 1)])
def test_nothing_is_asked_where_any_answer_would_do(model: nn.Module, chunk: int, options: Any, times: int) -> None:
    """Of one token, and of one chunk that is not divided by its targets."""
    seen: list[int] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.shape[1])
        return errors(outputs, targets).sum()

    sg.backward(model, TOKENS, VALUES, chunk=chunk, loss_fn=loss_fn, **options)
    assert seen == [chunk] * times


def test_a_chunk_in_which_nothing_counts_leaves_the_question_open(model: nn.Module) -> None:
    labels = LABELS.clone()
    labels[:, 20:] = -100
    mean = lambda y, t: F.cross_entropy(y.transpose(1, 2), t, reduction="sum") / (t != -100).sum().clamp(min=1)  # noqa: E731
    with pytest.raises(sg.InputError, match="the mean over its chunk"):
        sg.backward(model, TOKENS, labels, chunk=9, loss_fn=mean)


ALONG_TIME: dict[str, Loss] = {
    "a temporal difference": lambda y, t: (y - t - 0.9 * F.pad(y[:, 1:], (0, 0, 0, 1))).square().sum(-1),
    "over its mean": lambda y, t: errors(y, t).sum(-1) / errors(y, t).mean().detach(),
}


@pytest.mark.parametrize("name", ALONG_TIME)
def test_losses_of_tokens_that_look_along_time_are_refused(model: nn.Module, name: str) -> None:
    with pytest.raises(sg.InputError, match="loss_fn of tokens 0 to 8 looks along time"):
        sg.token_loss(model, TOKENS, VALUES, chunk=9, loss_fn=ALONG_TIME[name])
    losses = sg.token_loss(model, TOKENS, VALUES, chunk=9, loss_fn=lambda y, t: errors(y, t).sum(-1))
    assert losses.shape == (2, 40)


def test_a_prompt_that_counts_for_nothing_leaves_the_question_open(model: nn.Module) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return losses / losses.detach().sum().clamp(min=1)

    masked = LABELS.clone()
    masked[:, :9] = -100
    with pytest.raises(sg.InputError, match="loss_fn of tokens 9 to 17 looks along time"):
        sg.token_loss(model, TOKENS, masked, chunk=9, loss_fn=loss_fn)


@pytest.mark.parametrize("seed", range(8))
def test_terms_that_cancel_are_judged_by_their_gradients(model: nn.Module, seed: int) -> None:
    """Advantages with a mean of zero over the rows, in float32: the loss is rounding, its gradient is not."""
    torch.manual_seed(seed)
    advantages = torch.randn(4, 1).expand(4, 40)
    advantages = (advantages - advantages.mean(0)) / advantages.std(0)
    tokens = torch.randint(13, (4, 40))

    def loss_fn(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        chosen = outputs.log_softmax(-1).gather(-1, targets[0][..., None])[..., 0]
        return -((chosen - chosen.detach()).exp().float() * targets[1].float()).sum()

    sg.backward(model, tokens, (tokens, advantages), chunk=9, loss_fn=loss_fn)


@pytest.mark.parametrize("chunk", [8, 9])
def test_a_metric_along_time_is_refused(model: nn.Module, chunk: int) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")
        return {"loss": loss, "hits": outputs.argmax(-1) == targets}

    with pytest.raises(sg.InputError, match=r"the metric 'hits' with a time axis, shape \[2, \d\] for tokens"):
        sg.backward(model, TOKENS, LABELS, chunk=chunk, loss_fn=loss_fn)
    with pytest.raises(sg.InputError, match="the metric 'hits' with a time axis"):
        sg.evaluate(model, [TOKENS, TOKENS], [LABELS, LABELS], chunk=40, loss_fn=loss_fn)
    alone = sg.backward(model, TOKENS, LABELS, chunk=40, loss_fn=loss_fn).metrics["hits"]
    assert alone.shape == (2, 40)


def test_a_metric_as_wide_as_the_chunk_is_long(model: nn.Module) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": errors(outputs, targets).sum(), "by channel": outputs[..., :8].detach().sum(1)}

    found = sg.backward(model, TOKENS, VALUES, chunk=8, loss_fn=loss_fn).metrics["by channel"]
    torch.testing.assert_close(found, model(TOKENS, model.initial_state(2))[0][..., :8].detach().sum(1))


def test_without_the_question_a_mean_passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: with the check removed, the loss comes out five times too large."""
    loss_fn, targets = MEANS["[B, C, T]"]
    monkeypatch.setattr(SumCheck, "require", lambda *args: None)
    with pytest.raises(AssertionError):
        agrees(model, targets, loss_fn, chunk=9)


@pytest.mark.parametrize("name", ["[B, C, T]", "over a number", "and more", "nothing more", "another type"])
def test_a_graph_shows_a_mean_behind_numbers(model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_fn, targets = MEANS[name]
    outputs, _ = model(TOKENS, model.initial_state(2))
    assert is_mean_over_time(loss_fn(outputs, targets), 2, (0, 40))
    monkeypatch.setattr(SumCheck, "_ask", lambda *args: None)  # whatever keeps it from being asked
    with pytest.raises(sg.InputError, match="the mean over its chunk"):
        sg.backward(model, TOKENS, targets, chunk=9, loss_fn=loss_fn)
