"""Tensors and hooks that chunks cannot carry, and what changed on the way: refused by name, and `.grad` as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.toy_models import GatedRecurrence

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return GatedRecurrence().double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_classes_that_are_no_whole_numbers(model: nn.Module, dtype: torch.dtype) -> None:
    for way in (sg.backward, sg.loss, sg.token_loss, sg.evaluate):
        with pytest.raises(sg.InputError, match="expects the numbers of classes as targets"):
            way(model, TOKENS, TOKENS.to(dtype), chunk=9)
    assert all(p.grad is None for p in model.parameters())


def made(kind: str) -> Tensor:
    if kind == "quantised":
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)
    if kind == "nested":
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return torch.ones(2, 2).to_sparse() if kind == "sparse" else torch.ones(2, device="meta")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of prototypes
@pytest.mark.parametrize("kind", ["quantised", "nested", "sparse", "meta"])
def test_states_that_do_not_lie_in_memory(kind: str) -> None:
    class Beside(GatedRecurrence):
        def initial_state(self, batch_size: int) -> dict[str, Tensor]:
            return super().initial_state(batch_size) | {"beside": made(kind)}

        def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            outputs, following = super().forward(inputs, {k: x for k, x in state.items() if k != "beside"})
            return outputs, following | {"beside": state["beside"]}

    with pytest.raises(sg.ModelError, match=r"state \['beside'\] is a tensor whose elements do not lie in memory"):
        sg.backward(Beside(), TOKENS, chunk=9)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_buffer_is_left_alone(model: nn.Module) -> None:
    model.register_buffer("table", made("quantised"))
    assert sg.backward(model, TOKENS, chunk=9).loss.isfinite()


def test_a_parameter_that_is_frozen_on_the_way(model: nn.Module) -> None:
    segment = sg.Segment(model, TOKENS, chunk=9)
    segment.forward()
    name, parameter = next(iter(model.named_parameters()))
    parameter.requires_grad_(False)
    with pytest.raises(sg.ConsumedError, match=f"a parameter was frozen since the call began \\({name}\\)"):
        segment.reverse()
    assert all(p.grad is None for p in model.parameters())
    parameter.requires_grad_()  # nothing was lost
    segment.reverse(1 / segment.num_targets)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("how", ["full", "pre", "of every module"])
def test_backward_hooks_of_modules(model: nn.Module, how: str) -> None:
    """They would run for each chunk, on the gradient of a part."""
    if how == "of every module":
        hook = torch.nn.modules.module.register_module_full_backward_hook(lambda module, into, out: None)
    elif how == "full":
        hook = model.head.register_full_backward_hook(lambda module, into, out: None)
    else:
        hook = model.head.register_full_backward_pre_hook(lambda module, out: None)
    try:
        for way in (sg.backward, sg.loss, sg.outputs):
            with pytest.raises(sg.ModelError, match="has a backward hook"):
                way(model, TOKENS, chunk=9)
        with torch.no_grad():
            sg.evaluate(model, TOKENS, chunk=9)
    finally:
        hook.remove()
    assert sg.backward(model, TOKENS, chunk=9).loss.isfinite()


def test_what_an_initial_state_leaves_on_the_model_is_of_its_own_sequence() -> None:
    """Of a list, whose reverse sweep finds the last one's: refused, and not another loss."""

    class Scaled(GatedRecurrence):
        scale = 1.0

        def initial_state(self, batch_size: int) -> dict[str, Tensor]:
            self.scale = 1.0 / batch_size
            return super().initial_state(batch_size)

        def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            outputs, following = super().forward(inputs, state)
            return outputs * self.scale, following

    torch.manual_seed(0)
    model, rows = Scaled().double(), [TOKENS, TOKENS[:1]]
    expected = sg.evaluate(model, rows, chunk=9).loss
    loss = sg.loss(model, rows, chunk=9)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(sg.LossMismatchError):
        loss.backward()
