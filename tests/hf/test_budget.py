"""A budget in place of a chunk: the same gradients, whatever plan it buys, and a plan that is made anew in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import slimgrad.hf  # noqa: E402
from slimgrad.budget import planning  # noqa: E402
from slimgrad.budget.size import parse_bytes  # noqa: E402
from slimgrad.errors import InputError  # noqa: E402
from tests.hf.models import VOCABULARY, enable, gradients, hybrid, large, llama, mamba2, sweeps, window, worst  # noqa: E402

EXACT = 1e-10


def held() -> int:
    found = planning.held_bytes(torch.device("cpu"))
    assert found is not None
    return found


@pytest.mark.parametrize("make", [llama, window, hybrid, mamba2])
@pytest.mark.parametrize("more", ["80MB", "400MB"])
def test_the_same_gradients(make: Callable[[], Any], more: str) -> None:
    model = large(make())
    ids = torch.randint(3, VOCABULARY, (1, 300))
    _, expected = gradients(model, input_ids=ids, labels=ids)
    enable(model, None, memory=held() + parse_bytes(more), check=False)
    _, got = gradients(model, input_ids=ids, labels=ids)
    assert sweeps(model) == 1
    assert worst(got, expected) <= EXACT
    plan = model.base_model.forward.plan
    assert plan.peak <= plan.memory


def test_documents_of_several_lengths_and_no_gradients() -> None:
    model = large(llama())
    slimgrad.hf.enable(model, memory="8GiB", check=False)
    ids = torch.randint(3, VOCABULARY, (2, 200))
    mask = torch.ones_like(ids)
    mask[0, 120:] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert model.model.forward.plan.length == 200  # side by side: padding on the right changes nothing
    with torch.no_grad(), slimgrad.hf.evaluated_in_chunks(model.eval()):
        model(input_ids=ids, labels=ids)


def test_a_plan_is_made_anew_when_moments_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, more = large(llama()), 0
    real = planning.held_bytes
    monkeypatch.setattr(planning, "held_bytes", lambda device: real(device) + more)
    monkeypatch.setattr(planning, "resident_bytes", lambda: real(torch.device("cpu")) + more)
    slimgrad.hf.enable(model, memory=held() + (200 << 20), check=False)
    ids = torch.randint(3, VOCABULARY, (1, 400))
    model(input_ids=ids, labels=ids).loss.backward()
    first = model.model.forward.plan
    more = first.memory - first.peak + (2 << 20)
    model(input_ids=ids, labels=ids).loss.backward()
    second = model.model.forward.plan
    assert second.peak <= second.memory
    assert second.account["everything else that was there"] > first.account["everything else that was there"]


def test_one_dial_and_an_amount() -> None:
    with pytest.raises(InputError, match="expected one of them"):
        slimgrad.hf.enable(llama(), chunk=8, memory="1GB")
    model = llama().train()
    slimgrad.hf.enable(model, memory="1MB", check=False)
    ids = torch.randint(3, VOCABULARY, (1, 100))
    with pytest.raises(InputError, match=r"memory of 1\.0 MB: expected .* MB at least"):
        model(input_ids=ids, labels=ids)
