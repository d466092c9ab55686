"""What forward does to its context: every run of a chunk is given the same, in containers of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.contract.contract import collect, worst_error

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
WRITTEN = r"the model modified its context in place; expected it left alone.*context = context\.clone\(\)"
Use = Callable[[Any], Tensor]


class Captioner(nn.Module):
    """`use` makes of its context what is added to every token."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(13, 6), nn.Linear(6, 6), nn.Linear(6, 13)
        self.use = use
        self.double()

    def initial_state(self, batch_size: int) -> Tensor:
        return self.head.weight.new_zeros(batch_size, 6)

    def forward(self, inputs: Tensor, state: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        x, outputs, given = self.embed(inputs), [], self.use(context)
        for t in range(x.shape[1]):
            state = 0.9 * state + torch.tanh(self.mix(state) + x[:, t] + given)
            outputs.append(state)
        return self.head(torch.stack(outputs, 1)), state


def segment(model: nn.Module, **options: Any) -> Tensor:
    one = sg.Segment(model, TOKENS, chunk=7, **options)
    one.forward()
    return one.reverse().loss


def through_loss(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def outputs(model: nn.Module, **options: Any) -> Tensor:
    found = sg.outputs(model, TOKENS, chunk=7, **options)
    return nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


WAYS: dict[str, Callable[..., Tensor]] = {
    "backward": lambda model, **o: sg.backward(model, TOKENS, chunk=7, **o).loss,
    "loss": lambda model, **o: through_loss(sg.loss(model, TOKENS, chunk=7, **o)),
    "outputs": lambda model, **o: through_loss(outputs(model, **o)),
    "segment": segment,
    "evaluate": lambda model, **o: sg.evaluate(model, TOKENS, chunk=7, **o).loss,
}


def context(*, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


def add_in_place(given: Tensor) -> Tensor:
    with torch.no_grad():
        given += 0.5
    return given


def clamp_in_place(given: Tensor) -> Tensor:
    """The same each time, once it is done."""
    return given.detach().clamp_(-0.1, 0.1)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("use", [add_in_place, clamp_in_place])
@pytest.mark.parametrize("way", WAYS)
def test_written_in_place(way: str, use: Use, requires_grad: bool) -> None:
    model, given = Captioner(use), context(requires_grad=requires_grad)
    with pytest.raises(sg.ModelError, match=WRITTEN):
        WAYS[way](model, context=given)
    assert given.grad is None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_written_in_a_later_chunk(way: str) -> None:
    calls: list[int] = []

    def late(given: Tensor) -> Tensor:
        calls.append(1)
        return given.add_(0.5) if len(calls) == 4 else given

    with pytest.raises(sg.ModelError, match=WRITTEN):
        WAYS[way](Captioner(late), context=context())


def test_written_where_torch_counts_no_versions() -> None:
    with torch.inference_mode(), pytest.raises(sg.ModelError, match=WRITTEN):
        sg.evaluate(Captioner(lambda given: given.add_(0.5)), TOKENS, chunk=7, context=context() + 0)
    with pytest.raises(sg.ModelError, match=WRITTEN):
        sg.backward(Captioner(lambda given: given.data.add_(0.5)), TOKENS, chunk=7, context=context())


def test_verify_names_it() -> None:
    for use in (add_in_place, lambda given: given.mul_(2)):
        with pytest.raises(sg.ModelError, match=r"context .*modified in place|modified its context in place"):
            sg.verify(Captioner(use), TOKENS, chunk=7, context=context())


def other_entry(given: dict[str, Tensor]) -> Tensor:
    given["image"] = given["image"] * 1.5
    return given["image"]


def taken_out(given: dict[str, Tensor]) -> Tensor:
    return given.pop("image")


def longer_list(given: list[Any]) -> Tensor:
    given.append(1)
    return given[0] * len(given)


@pytest.mark.parametrize(
    ("use", "container"),
    [
        (other_entry, lambda x: {"image": x, "other": 3}),
        (taken_out, lambda x: {"image": x, "other": 3}),
        (longer_list, lambda x: [x]),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_other_entries_in_its_containers(way: str, use: Use, container: Callable[[Tensor], Any]) -> None:
    """Of no effect on other chunks, as in one call over the whole sequence."""
    torch.manual_seed(0)
    model = Captioner(use)
    whole = model(TOKENS, model.initial_state(2), container(expected_context := context(requires_grad=True)))[0]
    loss = nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    assert expected_context.grad is not None
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    given = container(x := context(requires_grad=True))
    before = str(given)
    found = WAYS[way](model, context=given)
    assert str(given) == before
    torch.testing.assert_close(found, loss.detach(), rtol=0, atol=1e-13)  # measured at most 4e-16
    if way != "evaluate":
        error, name = worst_error(collect(model, None, None), expected)
        assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured at most 9e-16
        torch.testing.assert_close(x.grad, expected_context.grad, rtol=1e-12, atol=0)


def test_verify_of_other_entries() -> None:
    torch.manual_seed(0)
    for use in (other_entry, taken_out):
        assert sg.verify(Captioner(use), TOKENS, chunk=7, context={"image": context()}).passed


@pytest.mark.parametrize("phase", ["forward", "reverse"])
def test_written_between_two_chunks(phase: str) -> None:
    given, model = context(), Captioner(lambda given: given)

    def on_chunk(event: sg.Event) -> None:
        if event.phase == phase and event.start == 14:
            given.mul_(2)

    with pytest.raises(sg.ConsumedError, match="the context was written to between two chunks"):
        sg.backward(model, TOKENS, chunk=7, context=given, on_chunk=on_chunk)
    assert all(p.grad is None for p in model.parameters())
