"""What is measured for a plan leaves no trace, however a model is used, and the call is as if it had named the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.call.losses import cross_entropy_sum
from tests.budget.planned import HELD, PLENTY, fix_what_is_held
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention, Signals

TIME = 300
MEMORY = HELD + (40 << 20)


@pytest.fixture(autouse=True)
def _held(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_what_is_held(monkeypatch)


class Guided(nn.Module):
    """Adds a context to what another model says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read = LinearAttention(), nn.Linear(3, 13)

    def initial_state(self, batch_size: int) -> Any:
        return self.inner.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Any, context: Tensor) -> Any:
        outputs, following = self.inner(inputs, state)
        return outputs + self.read(context)[:, None], following


class Sequence:
    """A reader that says which spans it was asked for."""

    batch, length = 1, TIME

    def __init__(self) -> None:
        self.tokens, self.asked = torch.randint(13, (1, TIME)), list[tuple[int, int]]()

    def read(self, start: int, stop: int) -> Tensor:
        self.asked.append((start, stop))
        return self.tokens[:, start:stop]


def with_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    wrong = (outputs.argmax(-1) != targets).sum()
    return {"loss": cross_entropy_sum(outputs, targets), "wrong": wrong}


def tokens(time: int = TIME, batch: int = 2) -> Tensor:
    return torch.randint(13, (batch, time))


def signals() -> tuple[nn.Module, Any, dict[str, Any]]:
    inputs = {name: torch.randn(2, TIME, 3, requires_grad=True) for name in ("left", "right")}
    return Signals(), inputs, {"targets": torch.randint(5, (2, TIME))}


def with_state() -> tuple[nn.Module, Any, dict[str, Any]]:
    model = AllKinds()
    with torch.no_grad():
        _, state = model(tokens(37), model.initial_state(2))
    state["tail"] = state["tail"].clone().requires_grad_()
    return model, tokens(), {"state": state}


def with_context() -> tuple[nn.Module, Any, dict[str, Any]]:
    return Guided(), tokens(), {"context": torch.randn(2, 3, requires_grad=True)}


def documents() -> tuple[nn.Module, Any, dict[str, Any]]:
    inputs = [tokens(50, 1), tokens(TIME, 1), tokens(90, 1)]
    return CachedAttention(), inputs, {"targets": [x.roll(-1, 1) for x in inputs]}


def frozen() -> tuple[nn.Module, Any, dict[str, Any]]:
    model = GatedRecurrence(dropout=0.2)
    model.embed.requires_grad_(False)
    model.dropout.eval()
    return model, tokens(), {}


CASES = {
    "signals": signals,
    "state": with_state,
    "context": with_context,
    "documents": documents,
    "frozen": frozen,
    "dropout": lambda: (GatedRecurrence(dropout=0.2), tokens(), {}),
    "reader": lambda: (LinearAttention(), Sequence(), {}),
    "metrics": lambda: (CachedAttention(), tokens(), {"loss_fn": with_metrics}),
    "tokens by themselves": lambda: (LinearAttention(), torch.randint(13, (TIME,)), {}),
}


def everything(model: nn.Module, *given: Any) -> list[Any]:
    """All that a call could leave a trace in."""
    leaves = [x.value if isinstance(x, sg.PrefixSum | sg.Growing) else x for x in pytree.tree_leaves(given)]
    tensors = [*model.parameters(), *model.buffers(), *(x for x in leaves if isinstance(x, Tensor))]
    return [
        [(id(x), x._version, x.requires_grad, x.grad, x.detach().clone().nan_to_num().tolist()) for x in tensors],
        [(m.training, sorted(vars(m)), m._forward_hooks, m._backward_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


def told(event: sg.Event) -> list[Any]:
    return [event.phase, event.start, event.stop, event.loss, event.adjoint_norm]


@pytest.mark.parametrize("case", CASES)
def test_a_plan_leaves_no_trace(case: str) -> None:
    torch.manual_seed(0)
    model, inputs, options = CASES[case]()
    before = everything(model, inputs, options)
    given = {name: x for name, x in options.items() if name != "targets"}
    plan = sg.plan(model, inputs, options.get("targets"), memory=MEMORY, **given)
    assert everything(model, inputs, options) == before
    assert 1 <= plan.chunk <= TIME
    assert plan.length == (440 if case == "documents" else TIME)


@pytest.mark.parametrize("case", CASES)
def test_the_call_is_as_if_its_plan_had_been_named(case: str) -> None:
    """Bit for bit: result, gradients, and what was told on the way."""
    found: list[Any] = []
    how: dict[str, Any] = {"memory": MEMORY}
    for _ in range(2):
        torch.manual_seed(0)
        model, inputs, options = CASES[case]()
        events: list[sg.Event] = []
        targets = options.pop("targets", None)
        result = sg.backward(model, inputs, targets, on_chunk=events.append, **how, **options)
        if result.plan is not None:
            how = {"chunk": result.plan.chunk, "schedule": result.plan.schedule}
        others = [x.grad for x in pytree.tree_leaves((inputs, options)) if isinstance(x, Tensor)]
        gradients = [p.grad for p in model.parameters()]
        found.append([result.loss, [*result.metrics.values()], gradients, others, [*map(told, events)]])
    first, second = (pytree.tree_leaves(one) for one in found)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_reader_is_asked_for_what_it_has() -> None:
    reader = Sequence()
    sg.plan(CachedAttention(), reader, memory=PLENTY)
    assert reader.asked
    assert all(0 <= start < stop <= TIME for start, stop in reader.asked)


def test_sinks_and_listeners_hear_nothing_of_it() -> None:
    model, sunk, heard = LinearAttention(), list[Tensor](), list[sg.Event]()
    x = tokens()
    plan = sg.plan(model, x, memory=MEMORY, sink={"head.weight": sunk.append})
    assert not sunk
    sg.backward(model, x, memory=MEMORY, sink={"head.weight": sunk.append}, on_chunk=heard.append)
    count = -(-TIME // plan.chunk)
    assert len(sunk) == count
    assert sum(event.phase == "reverse" for event in heard) == count
    assert "gradients" in plan.account


def test_under_autocast() -> None:
    model, x = LinearAttention(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = sg.plan(model, x, memory=MEMORY)
        low = sg.backward(model, x, plan=plan).loss
    high = sg.backward(model, x, memory=MEMORY).loss
    assert low != high
    assert float(low) == pytest.approx(float(high), rel=0.02)


def test_what_is_refused_is_refused_before_anything_is_measured() -> None:
    """By the same words as without a budget."""
    model = GatedRecurrence()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for wrong in ({"targets": tokens(5)}, {"sink": {"nobody": list[Any]().append}}):
        with pytest.raises(sg.InputError) as without:
            sg.backward(model, tokens(), chunk=100, **wrong)
        with pytest.raises(sg.InputError) as within:
            sg.backward(model, tokens(), memory=MEMORY, **wrong)
        assert str(without.value) == str(within.value)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(sg.InputError, match="nothing requires a gradient"):
        sg.backward(model, tokens(), memory=MEMORY)
    assert not calls


def test_a_model_that_writes_to_its_buffers_is_refused_and_left_as_it_was() -> None:
    class Counting(GatedRecurrence):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, inputs: Tensor, state: Any) -> Any:
            self.seen += inputs.shape[1]
            return super().forward(inputs, state)

    model, x = Counting(), tokens()
    before = torch.get_rng_state()
    with pytest.raises(sg.ModelError, match="wrote to its buffers"):
        sg.plan(model, x, memory=MEMORY)
    assert float(model.seen) == 0
    assert torch.equal(torch.get_rng_state(), before)
