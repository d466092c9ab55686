"""Dynamo compiles the model and leaves the sweep alone; without it, nothing of it is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slimgrad.states.base import Carrier, Purpose, Setting, State
from slimgrad.states.rows import Growing
from slimgrad.states.sums import PrefixSum, SumCarrier
from slimgrad.sweep.compiled import not_traced
from slimgrad.sweep.cut import Span
from slimgrad.sweep.store import Store

INSIDE = ("slimgrad/states/",)


def carried(initial: State) -> Carrier:
    return initial.carrier(Setting(0, "s", True, 2, Store("device")))


def compiled_lines(make: Callable[[], State], method: str) -> list[str]:
    """Move a state on within a compiled function, twice: the source lines of all that was compiled."""
    lines: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        lines.extend(line for node in graph.graph.nodes for line in node.meta.get("stack_trace", "").splitlines())
        return graph.forward

    @torch.compile(backend=backend)
    def step(state: Any, x: Tensor) -> tuple[Tensor, Any]:
        before, following = getattr(state, method)(x.sin())
        return before.cos(), following

    torch._dynamo.reset()
    carrier = carried(make())
    for position in range(2):
        _, following = step(carrier.bind(Span(position, position + 1), Purpose.FORWARD), torch.ones(2, 1, 3))
        carrier.take(following)
        carrier.settle()
    expected = torch.ones(2, 1, 3).sin() * 2 if method == "advance" else torch.ones(2, 2, 3).sin()
    assert torch.equal(carrier.final().value, expected)
    return lines


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's
@pytest.mark.parametrize(
    ("make", "method"),
    [
        (lambda: PrefixSum(torch.zeros(2, 1, 3)), "advance"),
        (lambda: Growing(torch.zeros(2, 0, 3)), "append"),
    ],
    ids=["sums", "rows"],
)
def test_dynamo_does_not_look_into_the_sweep(make: Callable[[], State], method: str) -> None:
    lines = compiled_lines(make, method)
    assert any("test_compiled.py" in line for line in lines)
    assert not any(place in line for line in lines for place in INSIDE)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor",
    "ignore:.*Function.* should not be instantiated",
    "ignore:Dynamo does not know how to trace the builtin",
)
def test_dynamo_would_look_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation."""
    monkeypatch.setattr(SumCarrier, "advance", SumCarrier.advance.__wrapped__)
    lines = compiled_lines(lambda: PrefixSum(torch.zeros(2, 1, 3)), "advance")
    assert any(place in line for line in lines for place in INSIDE)


def test_dynamo_is_not_loaded_for_it() -> None:
    program = (
        "import sys, torch, slimgrad as sg; from slimgrad.models import Performer, PerformerConfig\n"
        "model = Performer(PerformerConfig(layers=1, width=8, heads=1))\n"
        "sg.backward(model, torch.zeros(1, 8, dtype=torch.int64), chunk=4)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_function_that_is_not_traced_is_the_function() -> None:
    def double(x: int, *, of: int = 2) -> int:
        """Twice."""
        return of * x

    assert not_traced(double)(3, of=5) == 15
    assert not_traced(double).__doc__ == "Twice."
