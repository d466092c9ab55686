"""What a call leaves behind, and what a model keeps beside its state."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.contract.contract import collect, plain, require_close
from tests.test_inputs import TOKENS, WAYS, Conditioned, every_language_model, parameters_only, run
from tests.toy_models import GatedRecurrence


@every_language_model
def test_evaluate_in_inference_mode(model_type: type[nn.Module]) -> None:
    model = model_type().double()
    loss, _ = plain(model, TOKENS, None)
    with torch.inference_mode():
        result = sg.evaluate(model, TOKENS, chunk=7)
        again = sg.evaluate(model, [TOKENS[:1].clone(), TOKENS[1:].clone()], chunk=9)
    for one in (result, again):
        assert float(one.loss) == pytest.approx(float(loss), rel=1e-13)
    # and what came out of it may begin another call
    started = sg.backward(model, TOKENS, chunk=7, state=result.final_state)
    onward = sg.evaluate(model, TOKENS, chunk=7, state=result.final_state)
    assert float(started.loss) == pytest.approx(float(onward.loss), rel=1e-13)


class Rotary(GatedRecurrence):
    """Turns its inputs by their positions; the table grows with the longest position so far."""

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.register_buffer("table", None if rows is None else self.turns(rows), persistent=False)

    @staticmethod
    def turns(rows: int) -> Tensor:
        return torch.cos(torch.arange(rows)[:, None] / (1.0 + torch.arange(13)))

    def forward(self, inputs: Tensor, state: Any) -> Any:
        start = int(state["position"])
        outputs, state = super().forward(inputs, state)
        stop = int(state["position"])
        if self.table is None or self.table.shape[0] < stop:
            self.table = self.turns(2 * stop).to(outputs.dtype)
        return outputs * self.table[start:stop], state


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [None, 0, 4, 21, 100])
def test_a_table_that_grows_with_the_positions(way: str, rows: int | None) -> None:
    """A buffer that is filled or made longer, its first rows as they were, gives every chunk the same numbers."""
    torch.manual_seed(1)
    model = Rotary(rows).double()
    copy = Rotary(rows).double()
    copy.load_state_dict(model.state_dict())
    loss, expected = plain(copy, TOKENS, None)
    got = run(way, model, TOKENS, chunk=7)
    require_close((got, collect(model, None, None)), (loss, parameters_only(expected)))
    assert way == "loss" or float(sg.evaluate(model, TOKENS, chunk=7).loss) == float(got)


@pytest.mark.parametrize("way", ["loss", "token_loss"])
def test_a_loss_that_is_kept_holds_nothing_after_its_backward(way: str) -> None:
    """Neither kept states, nor gathered gradients, nor what was passed: a list of losses is a list of numbers."""
    model = Conditioned()
    tokens, context = TOKENS.clone(), torch.randn(2, 4, 13)
    alive = [weakref.ref(tokens), weakref.ref(context)]
    before = live_bytes()
    loss = getattr(sg, way)(model, tokens, context=context, chunk=1, schedule=sg.Keep()).sum()
    during = live_bytes()
    loss.backward()
    model.zero_grad()
    del tokens, context
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    given = TOKENS.nbytes + 2 * 4 * 13 * 4
    assert live_bytes() <= before - given + loss.nbytes
    assert during > before + 40 * 2 * 6 * 4  # the kept states were seen


def live_bytes() -> int:
    """Of all storages that Python can reach."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]  # no fakes of a compiler
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
