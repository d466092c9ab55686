"""A reader to watch, and every way to a gradient with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.call.losses import cross_entropy_sum

BATCH, TIME, CHUNK = 2, 40, 16  # chunks of 16, 16 and 8
TOKENS = torch.arange(BATCH * TIME).reshape(BATCH, TIME) * 7 % 13
TARGETS = torch.where(torch.arange(TIME) % 5 == 3, -100, TOKENS * 3 % 5)  # 64 that count
SIGNALS = {
    "left": torch.linspace(-1, 1, BATCH * TIME * 3).reshape(BATCH, TIME, 3).sin(),
    "right": torch.linspace(-1, 1, BATCH * TIME * 3).reshape(BATCH, TIME, 3).exp(),
}
SCHEDULES = [sg.Rebuild(), sg.Every(2), sg.Binomial(1)]
Reads = list[tuple[str, int, int]]
FORWARD: Reads = [("x", 0, 16), ("x", 16, 32), ("x", 32, 40)]


def pairs(reads: Reads) -> Reads:
    """The same spans of targets after those of the inputs."""
    return [(name, *span) for _, *span in reads for name in ("x", "y")]


class Reading:
    """Gives the spans of a tree by filling one buffer anew, and notes which it was asked for."""

    def __init__(self, whole: Any, name: str = "", log: Reads | None = None) -> None:
        self.whole, self.name, self.log = whole, name, [] if log is None else log
        self.buffer = pytree.tree_map(torch.empty_like, whole)

    @property
    def length(self) -> int:
        return pytree.tree_leaves(self.whole)[0].shape[1]

    @property
    def batch(self) -> int:
        return pytree.tree_leaves(self.whole)[0].shape[0]

    def read(self, start: int, stop: int) -> Any:
        self.log.append((self.name, start, stop))
        pytree.tree_map(lambda b, x: b[:, : stop - start].copy_(x[:, start:stop]), self.buffer, self.whole)
        return pytree.tree_map(lambda b: b[:, : stop - start], self.buffer)


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind()


def values(state: Any) -> list[Tensor]:
    return [getattr(leaf, "value", leaf) for leaf in pytree.tree_leaves(state) if not isinstance(leaf, int)]


def with_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    wrong = (outputs.argmax(-1) != targets) & (targets >= 0)
    return {"loss": cross_entropy_sum(outputs, targets), "wrong": wrong.sum()}


def backward(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    result = sg.backward(model, inputs, targets, loss_fn=with_metrics, **options)
    return [result.loss, result.num_targets, result.metrics["wrong"], *values(result.final_state)]


def loss(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    found = sg.loss(model, inputs, targets, **options)
    found.backward()
    return [found]


def token_loss(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    losses = sg.token_loss(model, inputs, targets, **options)
    (losses * torch.linspace(0.1, 1, losses.shape[1])).sum().backward()
    return [losses]


def outputs(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    found = sg.outputs(model, inputs, **options)
    found.square().sum().backward()
    return [found]


def evaluate(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    del options["schedule"]
    result = sg.evaluate(model, inputs, targets, loss_fn=with_metrics, **options)
    return [result.loss, result.num_targets, result.metrics["wrong"], *values(result.final_state)]


def segment(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> list[Any]:
    one = sg.Segment(model, inputs, targets, loss_fn=with_metrics, **options)
    final = one.forward()
    result = one.reverse()
    return [result.loss, result.num_targets, result.metrics["wrong"], *values(final)]


WAYS = {way.__name__: way for way in (backward, loss, token_loss, outputs, evaluate, segment)}


def gradients(model: nn.Module) -> list[Tensor | None]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def require_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
