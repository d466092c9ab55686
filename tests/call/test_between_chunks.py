"""Weights and gathered gradients that change while a call is under way: every way refuses them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.toy_models import GatedRecurrence

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
OnChunk = Callable[[sg.Event], None]


class Model(GatedRecurrence):
    """With a buffer, and a place to do something within forward."""

    def __init__(self, within: Callable[[Model], Any] | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(13))
        self.within = within

    def forward(self, inputs: Tensor, state: Any) -> Any:
        if self.within is not None:
            self.within(self)
        outputs, state = super().forward(inputs, state)
        return outputs * self.scale, state


def segment(model: nn.Module, **options: Any) -> None:
    one = sg.Segment(model, TOKENS, chunk=7, **options)
    one.forward()
    one.reverse()


WAYS: dict[str, Callable[..., Any]] = {
    "backward": lambda model, **o: sg.backward(model, TOKENS, chunk=7, **o),
    "list": lambda model, **o: sg.backward(model, [TOKENS, TOKENS[:, :30]], chunk=7, **o),
    "loss": lambda model, **o: sg.loss(model, TOKENS, chunk=7, **o).backward(),
    "segment": segment,
    "evaluate": lambda model, **o: sg.evaluate(model, TOKENS, chunk=7, **o),
}
WRITES: dict[str, tuple[str, Callable[[Model], Any]]] = {
    "a weight that makes outputs alone": ("head.weight", lambda model: model.head.weight.mul_(0.9)),
    "a weight that makes states": ("embed.weight", lambda model: model.embed.weight[0].zero_()),
    "a buffer": ("Model.scale", lambda model: model.scale.mul_(0.9)),
    "another buffer": ("Model.scale", lambda model: setattr(model, "scale", torch.full((13,), 0.9))),
}


def when(phase: str, model: Model, write: Callable[[Model], Any]) -> OnChunk:
    def on_chunk(event: sg.Event) -> None:
        if event.phase == phase and event.start == 14:
            with torch.no_grad():
                write(model)

    return on_chunk


@pytest.mark.parametrize(
    ("way", "phase"), [(way, phase) for way in WAYS for phase in ("forward", "reverse")[: 2 - (way == "evaluate")]]
)
@pytest.mark.parametrize("what", WRITES)
def test_weights_that_change_between_two_chunks(way: str, what: str, phase: str) -> None:
    model, (name, write) = Model(), WRITES[what]
    message = rf"parameters or buffers were written to between two chunks: {name}\."
    with pytest.raises(sg.ConsumedError, match=message):
        WAYS[way](model, on_chunk=when(phase, model, write))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("way", ["backward", "list", "loss", "segment"])
def test_gathered_gradients_that_forward_drops(way: str, set_to_none: bool) -> None:
    model = Model(lambda model: model.head.zero_grad(set_to_none=set_to_none))
    with pytest.raises(sg.ModelError, match=r"forward changed the \.grad of the model's parameters"):
        WAYS[way](model)
    assert all(p.grad is None for p in model.parameters())


def test_gathered_gradients_of_the_context_that_forward_drops() -> None:
    class Forgetful(GatedRecurrence):
        def forward(self, inputs: Tensor, state: Any, context: Tensor) -> Any:
            context.grad = None
            outputs, state = super().forward(inputs, state)
            return outputs * context, state

    given = torch.ones(13, requires_grad=True)
    with pytest.raises(sg.ModelError, match=r"forward changed the \.grad"):
        sg.backward(Forgetful(), TOKENS, chunk=7, context=given)
    assert given.grad is None
