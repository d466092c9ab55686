"""What is refused between the sweeps, and what is refused in the numbers: each by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.test_refusals import TOKENS, Bent, require_refused, require_untouched
from tests.toy_models import CachedAttention, GatedRecurrence, LinearAttention

# --- between the sweeps ---


@pytest.mark.parametrize("loss", [sg.loss, sg.token_loss])
def test_a_second_backward(loss: Callable) -> None:
    model = GatedRecurrence()
    value = loss(model, TOKENS, chunk=7).sum()
    value.backward(retain_graph=True)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(sg.ConsumedError, match="backward was called a second time on one chunked loss"):
        value.backward()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_parameter_changed_between_loss_and_backward() -> None:
    model = GatedRecurrence()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sg.backward(model, TOKENS, chunk=7)
    loss = sg.loss(model, TOKENS, chunk=7)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(sg.ConsumedError, match=r"modified between the loss and its backward.*before optimizer.step"):
        loss.backward()
    require_untouched(model)


@pytest.mark.parametrize("what", ["inputs", "context", "state"])
def test_an_input_that_takes_gradients_changed_between_loss_and_backward(what: str) -> None:
    class Driven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def initial_state(self, batch_size: int) -> Tensor:
            return torch.zeros(batch_size, 3)

        def forward(self, inputs: Tensor, state: Tensor, context: Tensor) -> Any:
            h = state[:, None] + inputs.cumsum(1)
            return self.head(h * context), h[:, -1]

    given = {"inputs": torch.rand(2, 9, 3), "context": torch.rand(3), "state": torch.rand(2, 3)}
    given = {name: x.requires_grad_(name == what) for name, x in given.items()}
    loss = sg.loss(
        Driven(), given["inputs"], torch.zeros(2, 9, dtype=torch.int64), context=given["context"], state=given["state"],
        chunk=4,
    )  # fmt: skip
    with torch.no_grad():
        given[what].mul_(2)
    with pytest.raises(sg.ConsumedError, match="a parameter, an input, a target or a state was modified"):
        loss.backward()


@pytest.mark.parametrize("what", ["tokens", "targets"])
def test_tokens_or_targets_overwritten_between_loss_and_backward(what: str) -> None:
    """A data loader that reuses its buffers: the chunks cannot be rebuilt as they were."""
    model = GatedRecurrence()
    given = {"tokens": TOKENS.clone(), "targets": TOKENS.roll(-1, 1)}
    loss = sg.loss(model, given["tokens"], given["targets"], chunk=7)
    given[what].add_(1).remainder_(13)
    with pytest.raises(sg.ConsumedError, match="modified between the loss and its backward"):
        loss.backward()
    require_untouched(model)


# --- in the numbers ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_in_a_sum_names_state_and_chunk(bad: float) -> None:
    def spoil(inner: nn.Module, x: Tensor, s: Any) -> Any:
        delta = torch.zeros(2, 4, 5)
        if int(x[0, 0]) == 14 * 7 % 13:  # the third chunk of TOKENS
            delta[1, 2, 3] = bad
        _, sums = s["sums"].advance(delta)
        _, position = s["position"].advance(torch.tensor(7))
        return inner.head(inner.embed(x)), {"sums": sums, "position": position}

    kind = "NaN" if bad != bad else "infinity"
    require_refused(
        Bent(spoil, LinearAttention()), sg.NonFiniteError,
        rf"state \['sums'\], tokens 14 to 20: a contribution to the sum holds an? {kind}; expected finite values",
    )  # fmt: skip
    state = {"sums": sg.PrefixSum(torch.full((2, 4, 5), bad)), "position": sg.PrefixSum(torch.tensor(0))}
    require_refused(LinearAttention(), sg.NonFiniteError, rf"initial state \['sums'\]: .* {kind}", state=state)


def test_a_draw_that_is_not_torchs_names_state_and_chunk() -> None:
    def noisy(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        return outputs, state | {"h": state["h"] + random.random()}

    require_refused(
        Bent(noisy), sg.StateMismatchError,
        r"state \['h'\], tokens \d+ to \d+: rebuilt with other bits than in the forward sweep.*draw from another",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "name"), [(LinearAttention, "sums"), (CachedAttention, "keys"), (GatedRecurrence, "h")]
)
@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)], ids=str)
def test_a_weight_changed_behind_the_sweeps_back(model_type: type[nn.Module], name: str, schedule: sg.Schedule) -> None:
    """Every kind of state notices, under every schedule, also what torch counts no version of."""
    model = model_type()

    def meddle(event: sg.Event) -> None:
        if event.phase == "reverse" and event.start == 21:
            model.embed.weight.data.mul_(1.001)

    with pytest.raises(sg.StateMismatchError, match=rf"state \['{name}'\], tokens \d+ to \d+: rebuilt"):
        sg.backward(model, TOKENS, chunk=7, schedule=schedule, on_chunk=meddle)
    require_untouched(model)


class WrongAdvance(LinearAttention):
    def advance(self, inputs: Tensor, state: Any) -> Any:
        return super().advance(inputs // 2, state)


def test_an_advance_that_computes_otherwise_than_forward() -> None:
    with pytest.raises(sg.StateMismatchError, match="`advance` computing otherwise than `forward`"):
        sg.backward(WrongAdvance(), TOKENS, chunk=7)
