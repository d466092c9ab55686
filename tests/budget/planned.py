"""Plans within budgets that do not depend on what the process happens to hold, and what is alive while they run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.budget import planning
from slimgrad.budget.choose import Chooser
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.request import Request
from slimgrad.call.arguments import DEFAULT_CHUNK, Options
from slimgrad.call.losses import cross_entropy_sum, token_cross_entropy

HELD = 100 << 20  # what the process is said to hold
PLENTY = 16 << 30
NOT_ALIVE = ("allocator", "nodes of graphs", "weights", "everything else that was there")
CPU = torch.device("cpu")


def fix_what_is_held(monkeypatch: pytest.MonkeyPatch, num_bytes: int = HELD) -> None:
    """The process holds so much from now on, as far as plans know. First touches of memory cost nothing."""
    monkeypatch.setattr(planning, "held_bytes", lambda device: num_bytes)
    monkeypatch.setattr(planning, "resident_bytes", lambda: num_bytes)
    monkeypatch.setattr(planning, "fault_seconds", lambda: 0.0)


def request(model: nn.Module, inputs: Any, targets: Any = None, *, way: str = "backward", **options: Any) -> Request:
    """What the public function of that name asks for."""
    loss_fns = {"outputs": None, "token_loss": token_cross_entropy}
    given = {"context": None, "chunk": DEFAULT_CHUNK, "schedule": None, "normalizer": "targets", "state": None}
    given |= {"loss_fn": loss_fns.get(way, cross_entropy_sum), "on_chunk": None} | options
    sink = given.pop("sink", None)
    how = {"head": way != "backward", "differentiates": way != "evaluate", "per_token": way == "token_loss"}
    return Request(model, inputs, targets, Options(**given), sink, **how)


def measured(asked: Request) -> Chooser:
    """What a request is planned by, after it was planned once."""
    return planning.chooser_for(asked, PLENTY)[1]


def alive(account: Any) -> int:
    """The bytes of an account that tensors of the call will take."""
    return sum(num_bytes for name, num_bytes in account.items() if name not in NOT_ALIVE)


def most_alive(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that were alive during it, beside those from before."""
    gc.collect()
    with LiveBytes() as live:
        work()
    return live.peak


def run(way: str, model: nn.Module, inputs: Any, **options: Any) -> Any:
    """A public function, there and back; its loss, losses or outputs."""
    model.zero_grad(set_to_none=True)
    if way == "backward":
        return sg.backward(model, inputs, **options).loss
    if way == "evaluate":
        return sg.evaluate(model, inputs, **options).loss
    found = sg.Chunked(model, **options)(inputs) if way == "Chunked" else getattr(sg, way)(model, inputs, **options)
    several = found if isinstance(found, list) else [found]
    torch.autograd.backward(several, [torch.ones_like(x) for x in several])
    return [x.detach() for x in several]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, taken off the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
