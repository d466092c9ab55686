"""What models write to in place on their way: right as in plain PyTorch, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.contract.contract import collect, plain, worst_error

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)]


class Base(nn.Module):
    """A sum and a cache; `steps` is where the kinds below write."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(13, 6), nn.LayerNorm(6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 13)
        self.double()

    def initial_state(self, batch_size: int) -> dict[str, Any]:
        zeros = self.head.weight.new_zeros
        return {"sum": sg.PrefixSum(zeros(batch_size, 6)), "rows": sg.Growing(zeros(batch_size, 0, 6))}

    def over(self, x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        before, total = state["sum"].advance(x.sum(1))
        start = state["rows"].length
        rows, following = state["rows"].append(x)
        seen = torch.arange(rows.shape[1])[None] <= torch.arange(start, start + x.shape[1])[:, None]
        read = (seen.to(x.dtype) / seen.sum(1, keepdim=True)) @ rows
        return torch.tanh(x + before[:, None] + x.cumsum(1) + read), {"sum": total, "rows": following}

    def forward(self, inputs: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        y, state = self.over(self.norm(self.embed(inputs)), state)
        return self.head(y), state


class AfterALayer(Base):
    """ReLU in place on what a linear layer with a bias returns: what every `nn.Sequential` of old does."""

    def forward(self, inputs: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        y, state = self.over(torch.relu_(self.mix(self.embed(inputs))), state)
        outputs = self.head(y)
        outputs /= 2
        return outputs, state


class RowsAfterAppend(Base):
    """Writes to the very rows that were appended, and to the contribution that was added."""

    def over(self, x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        delta, within = x.sum(1), x.cumsum(1)
        before, total = state["sum"].advance(delta)
        start = state["rows"].length
        rows, following = state["rows"].append(x)
        x *= 2
        delta *= 3
        seen = torch.arange(rows.shape[1])[None] <= torch.arange(start, start + x.shape[1])[:, None]
        read = (seen.to(x.dtype) / seen.sum(1, keepdim=True)) @ rows
        return torch.tanh(x + before[:, None] + within + read), {"sum": total, "rows": following}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("model_type", [AfterALayer, RowsAfterAppend])
def test_in_place_as_in_plain(model_type: type[nn.Module], schedule: sg.Schedule) -> None:
    torch.manual_seed(0)
    model = model_type()
    expected = plain(model, TOKENS, None)[1]
    for way in ("backward", "loss"):
        if way == "backward":
            sg.backward(model, TOKENS, chunk=7, schedule=schedule)
        else:
            sg.loss(model, TOKENS, chunk=7, schedule=schedule).backward()
        found = collect(model, None, None)
        error, name = worst_error(found, {n: g for n, g in expected.items() if not n.startswith("state")})
        assert error <= 1e-12, f"{way}: {name} is off by {error:.1e}"  # measured at most 6e-16


def test_a_weight_given_other_memory_is_refused() -> None:
    class Decayed(Base):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            self.head.weight.data = self.head.weight.data * 0.9
            return super().forward(inputs, state)

    for call in (sg.backward, sg.loss):
        model = Decayed()
        with pytest.raises(sg.ModelError, match=r"parameters were written to while a chunk ran: weight was replaced"):
            call(model, TOKENS, chunk=7)
        assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_writes_to_the_state_is_refused() -> None:
    class Shares(Base):
        def initial_state(self, batch_size: int) -> Any:
            return self.head.weight.new_zeros(batch_size, 13)

        def forward(self, inputs: Tensor, state: Any) -> Any:
            outputs = self.head(self.embed(inputs)) + state[:, None]
            return outputs, outputs[:, -1]

    with pytest.raises(sg.InputError, match="loss_fn wrote in place to outputs that share memory with the state"):
        sg.backward(Shares(), TOKENS, chunk=7, loss_fn=lambda outputs, targets: outputs.sub_(1).square().sum())


def test_a_sink_may_write_to_what_it_gets() -> None:
    class Shared(Base):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = (nn.Parameter(torch.randn(6, dtype=torch.float64)) for _ in range(2))

        def forward(self, inputs: Tensor, state: Any) -> Any:
            y, state = self.over(self.norm(self.embed(inputs)), state)
            return self.head(y * (self.p.view(6) + self.q.view(6))), state

    torch.manual_seed(0)
    model = Shared()
    expected = plain(model, TOKENS, None)[1]
    sg.backward(model, TOKENS, chunk=7, sink={"p": lambda g: g.mul_(0)})
    assert model.p.grad is None
    assert float((model.q.grad - expected["q"]).norm() / expected["q"].norm()) <= 1e-12  # measured 3e-16


def test_metrics_add_up_whatever_their_type() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        flag, byte, half = torch.tensor(True), torch.tensor(200, dtype=torch.uint8), torch.tensor(1000.0).bfloat16()
        return {"loss": outputs.square().sum(), "flag": flag, "byte": byte, "half": half}

    metrics = sg.backward(Base(), TOKENS, chunk=7, loss_fn=loss_fn).metrics
    assert [int(metrics[name]) for name in ("flag", "byte", "half")] == [6, 1200, 6000]
