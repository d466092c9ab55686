"""The specification is short, takes any step, equals plain backpropagation, and is found out where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import slimgrad as sg
from slimgrad.sweep import algorithm1
from tests.contract import contract
from tests.contract.cases import CASES

build = dict(CASES)


def test_is_a_page() -> None:
    assert len(Path(algorithm1.__file__).read_text().splitlines()) < 60


@pytest.mark.parametrize("name", ["gated", "cached", "all kinds", "linear attention", "signals"])
def test_a_cut_adjoint_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithm1, "sum", lambda products: 0, raising=False)  # Phi = L(n), <G(n), B(n)> left out
    with pytest.raises(AssertionError, match=r"Algorithm 1 against plain: .* is off by"):
        contract.check(build[name], chunk=9)


def test_a_step_of_ones_own() -> None:
    """A function that is no module: complex, integer and Python state, sums and rows, one tensor as two leaves."""
    torch.manual_seed(0)
    w, decay = (torch.randn(3, dtype=torch.complex128, requires_grad=True) for _ in range(2))
    x = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)

    def start() -> list[object]:
        h = seed * w
        return [h, (h, 0, None), sg.PrefixSum(h.abs()), sg.Growing(h.real[:, None]), torch.tensor(0)]

    def step(x: Tensor, state: list) -> tuple[Tensor, list]:
        h, (first, calls, nothing), total, rows, position = state
        loss = torch.zeros((), dtype=torch.float64)
        for t in range(x.shape[1]):
            h = h * decay / (1 + decay.abs()) + w * x[:, t] + 0.01j * position
            loss = loss + (h * first.conj()).imag.sum()
            _, total = total.advance(h.abs())
            seen, rows = rows.append(h.imag[:, None])
            loss = loss + (seen.mean(1) * total.value).tanh().sum()
            position = position + 1
        return loss, [h, (first, calls + 1, nothing), total, rows, position]

    expected_loss, _ = step(x, start())
    expected = torch.autograd.grad(expected_loss, [w, decay, x, seed])
    for chunk in (1, 7, 20):
        loss, parameters, inputs, state = algorithm1.gradients(step, x.split(chunk, 1), start(), [w, decay, seed])
        got = [*parameters[:2], torch.cat([of_chunk for [of_chunk] in inputs], 1), parameters[2]]
        torch.testing.assert_close(loss.detach(), expected_loss.detach(), rtol=1e-13, atol=0)
        # the initial state's gradient, taken on to what that state is made of
        h, (first, _, _), total, rows, _ = start()
        got += torch.autograd.grad([h, first, total.value, rows.value], [seed], state)
        for a, b in zip(got, [*expected, expected[-1]], strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-14  # measured: 2e-16
