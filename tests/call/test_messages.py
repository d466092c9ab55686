"""What cannot be swept is refused in words of its own, before torch's come up from somewhere inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from tests.toy_models import GatedRecurrence

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13


@dataclass
class Scores:
    logits: Tensor
    temperature: float = 1.0


class InDataclass(GatedRecurrence):
    """Its outputs are an object that torch's pytrees do not know."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        return Scores(outputs), following


class Scripted(GatedRecurrence):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.jit.trace(nn.Linear(6, 13), torch.zeros(2, 6))


class Cell(nn.Module):
    """`[layers, batch, width]`, as torch's own recurrent layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.embed = nn.GRU(6, 13, 2, batch_first=True), nn.Embedding(13, 6)

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(2, batch_size, 13)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(self.embed(inputs), state)


def summed(outputs: Scores, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), reduction="sum")


def test_outputs_in_an_object_are_looked_into() -> None:
    torch.manual_seed(0)
    model, plain = InDataclass().double(), GatedRecurrence().double()
    plain.load_state_dict(model.state_dict())
    for name, one, loss_fn in (("object", model, summed), ("tensor", plain, None)):
        assert sg.backward(one, TOKENS, chunk=9, loss_fn=loss_fn).num_targets == 78, name
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-14, atol=0)  # measured: the same bits
    with pytest.raises(sg.InputError, match="a loss without a graph for tokens 36 to 39"):
        sg.backward(model, TOKENS, chunk=9, loss_fn=lambda y, t: summed(Scores(y.logits.detach()), t))
    with pytest.raises(sg.InputError, match="returned the mean over its chunk"):
        sg.backward(model, TOKENS, chunk=9, loss_fn=lambda y, t: summed(y, t) / (t != -100).sum())
    with pytest.raises(sg.InputError, match=r"expects logits \[batch, time, classes\] .* got a Scores and \[2, 4\]"):
        sg.backward(model, TOKENS, chunk=9)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch is done with it
def test_modules_of_torch_jit() -> None:
    for way in (sg.backward, sg.loss, sg.evaluate, sg.verify):
        with pytest.raises(sg.ModelError, match=r"Linear was made by torch\.jit"):
            way(Scripted(), TOKENS, chunk=9)


def test_a_packed_sequence() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.arange(5), torch.arange(3)])
    for given in ((packed,), (TOKENS, packed)):
        with pytest.raises(sg.InputError, match=r"(inputs|targets): .*got a PackedSequence.*Pass a list of tensors"):
            sg.backward(GatedRecurrence(), *given, chunk=9)
    with pytest.raises(sg.InputError, match="got a PackedSequence"):
        sg.verify(GatedRecurrence(), packed)


@pytest.mark.parametrize("way", [sg.backward, sg.loss, sg.evaluate])
def test_a_state_of_another_batch(way: Any) -> None:
    with pytest.raises(sg.InputError, match=r"state \['h'\]: expected a state for a batch of 2, .*got \[3, 6\]"):
        way(GatedRecurrence(), TOKENS, chunk=9, state=GatedRecurrence().initial_state(3))
    with pytest.raises(sg.InputError, match=r"state \(the state itself\): .*got \[2, 4, 13\] .*makes \[2, 3, 13\]"):
        way(Cell(), TOKENS[[0, 1, 0]], chunk=9, state=Cell().initial_state(4))
    way(Cell(), TOKENS, chunk=9, state=Cell().initial_state(2))
    way(GatedRecurrence(), TOKENS, chunk=9, state=GatedRecurrence().initial_state(1))  # one for all


def test_a_normalizer_that_is_no_number() -> None:
    for value in (None, [3]):
        with pytest.raises(sg.InputError, match=r"normalizer=.*: expected 'targets', a number or a tensor"):
            sg.backward(GatedRecurrence(), TOKENS, chunk=9, normalizer=value)
    for number in (np.int64(3), np.float32(3), 3, torch.tensor(3)):
        assert float(sg.backward(GatedRecurrence(), TOKENS, chunk=9, normalizer=number).loss) > 0
