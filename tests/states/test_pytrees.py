"""Containers of a state: whatever torch can flatten is exact; what it cannot, or what changes its kind, is refused."""

from __future__ import annotations

import enum
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import slimgrad as sg
from tests.contract.kinds import CHUNK, TOKENS, Net, both_ways, built, plain_grads, require_exact

SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)]


class Pair(NamedTuple):
    h: Tensor
    seen: Any


@dataclass
class Registered:
    h: Any
    seen: Any
    label: str = "a"


@dataclass
class WithLast:
    h: Any
    seen: Any
    last: Any = None


class Noted:
    """Registered without names for its entries."""

    def __init__(self, h: Tensor, seen: Any) -> None:
        self.h, self.seen = h, seen


@dataclass
class Unregistered:
    h: Tensor
    seen: Any


pytree.register_dataclass(Registered, field_names=["h", "seen"], drop_field_names=["label"])
pytree.register_dataclass(WithLast)
pytree.register_pytree_node(Noted, lambda x: ([x.h, x.seen], None), lambda parts, _: Noted(*parts))


class Held(Net):
    """Its recurrence's state, and a sum over time, in a container of some kind."""

    def __init__(self, make: Callable[[Any, Any], Any], read: Callable[[Any], tuple[Any, Any]]) -> None:
        super().__init__()
        self.make, self.read = make, read

    def initial_state(self, batch_size: int) -> Any:
        h = super().initial_state(batch_size)
        return self.make(h, sg.PrefixSum(torch.zeros_like(h)))

    def forward(self, tokens: Tensor, state: Any) -> Any:
        h, seen = self.read(state)
        x = self.embed(tokens)
        before, seen = seen.advance(x.sum(1))
        y, h = self.roll(x + torch.tanh(before[:, None] + x.cumsum(1)), h)
        return self.head(y), self.make(h, seen)


def fields(state: Any) -> tuple[Any, Any]:
    return state.h, state.seen


CONTAINERS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "registered dataclass": (Registered, fields),
    "dataclass with a field that stays None": (WithLast, fields),
    "node without keys": (Noted, fields),
    "node within a list": (lambda h, seen: [Noted(h, seen)], lambda state: fields(state[0])),
    "dataclass within a dict": (lambda h, seen: {"a": (Registered(h, seen),)}, lambda state: fields(state["a"][0])),
    "named tuple": (Pair, fields),
    "ordered dict": (
        lambda h, seen: OrderedDict(seen=seen, h=h), lambda state: (state["h"], state["seen"]),
    ),
    "default dict": (
        lambda h, seen: defaultdict(list, h=h, seen=seen), lambda state: (state["h"], state["seen"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_that_torch_can_flatten(name: str) -> None:
    model = built(lambda: Held(*CONTAINERS[name]))
    expected = plain_grads(model)
    both_ways(None, model, expected)
    for schedule in SCHEDULES:
        both_ways(None, model, expected, schedule=schedule)
    first = sg.backward(model, TOKENS[:, :20], chunk=CHUNK)
    assert type(first.final_state) is type(model.initial_state(2))
    assert type(first.initial_state_grad) is type(first.final_state)
    model.zero_grad()
    carried = model.initial_state(2)
    _, carried = model(TOKENS[:, :20], carried)
    torch.testing.assert_close(model.read(first.final_state)[0], model.read(carried)[0].detach(), rtol=1e-13, atol=0)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Valued(Net):
    """A value beside the tensor, which changes from chunk to chunk and is read."""

    values: tuple[Any, ...] = (Colour.RED, Colour.BLUE)

    def initial_state(self, batch_size: int) -> Any:
        return {"h": super().initial_state(batch_size), "value": self.values[0]}

    def forward(self, tokens: Tensor, state: Any) -> Any:
        index = self.values.index(state["value"])
        outputs, h = super().forward(tokens, state["h"])
        following = self.values[(index + 1) % len(self.values)]
        return outputs * (1 + 0.1 * index), {"h": h, "value": following}


@pytest.mark.parametrize(
    "values",
    [
        (Colour.RED, Colour.BLUE),
        ("first", "second", "third"),
        (b"a", b"b"),
        (0, 1, 2),
        (False, True),
        (0.5, 1.5),
        (1j, 2j),
        (None, 1),
        (torch.float32, torch.float64),
    ],
    ids=lambda values: type(values[-1]).__name__,
)
def test_values_that_change_from_chunk_to_chunk(values: tuple[Any, ...]) -> None:
    model = built(Valued)
    model.values = values
    expected = plain_grads(model, chunk=CHUNK)
    for schedule in SCHEDULES:
        both_ways(None, model, expected, schedule=schedule)


def test_a_tuple_of_values_is_a_container_of_them() -> None:
    class Tuples(Net):
        def initial_state(self, batch_size: int) -> Any:
            return {"h": super().initial_state(batch_size), "place": (0, ("even", Colour.RED))}

        def forward(self, tokens: Tensor, state: Any) -> Any:
            number, (name, colour) = state["place"]
            outputs, h = super().forward(tokens, state["h"])
            scale = 1 + 0.1 * number + (name == "odd") + 0.5 * colour.value
            following = number + 1, ("even" if number % 2 else "odd", Colour((number + 1) % 2 + 1))
            return outputs * scale, {"h": h, "place": following}

    model = built(Tuples)
    both_ways(None, model, plain_grads(model, chunk=CHUNK))


@pytest.mark.parametrize("value", [0, 0.0, True, "nothing"], ids=lambda value: type(value).__name__)
def test_a_value_that_comes_back_as_a_tensor(value: Any) -> None:
    class Numbered(Net):
        def initial_state(self, batch_size: int) -> Any:
            return {"h": value}

        def forward(self, tokens: Tensor, state: Any) -> Any:
            h = state["h"] if isinstance(state["h"], Tensor) else super().initial_state(len(tokens))
            outputs, h = super().forward(tokens, h)
            return outputs, {"h": h}

    kind = type(value).__name__
    message = rf"state \['h'\] began as a {kind} and came back as a tensor \[2, 8\] in tokens 0 to 8.*Begin with zeros"
    model = built(Numbered)
    expected = plain_grads(model, chunk=CHUNK)
    with pytest.raises(sg.ModelError, match=message):
        sg.backward(model, TOKENS, chunk=CHUNK)
    both_ways(message, model, expected)


class Late(Net):
    """Fills a field of its state in the first chunk."""

    def __init__(self, make: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.make = make

    def initial_state(self, batch_size: int) -> Any:
        return self.make(super().initial_state(batch_size), None)

    def forward(self, tokens: Tensor, state: Any) -> Any:
        h, last = (state["h"], state["last"]) if isinstance(state, dict) else (state.h, state.last)
        outputs, h = super().forward(tokens, h)
        if last is not None:
            outputs = outputs + last
        return outputs, self.make(h, outputs[:, -1:])


def with_last(h: Any, last: Any) -> WithLast:
    return WithLast(h, 0, last)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            with_last,
            r"(?s)of another structure than it was given: .*a field that is None at first: begin with zeros",
        ),
        (lambda h, last: {"h": h, "last": last}, r"state \['last'\] began as None and came back .*Begin with zeros"),
    ],
    ids=["dataclass", "dict"],
)
def test_a_field_that_is_none_at_first(make: Callable[[Any, Any], Any], message: str) -> None:
    model = built(lambda: Late(make))
    expected = plain_grads(model, chunk=CHUNK)
    for call in (sg.backward, sg.loss, sg.evaluate):
        with pytest.raises(sg.ModelError, match=message):
            call(model, TOKENS, chunk=CHUNK)
    both_ways(message, model, expected)


def test_an_unregistered_dataclass_is_refused_by_name() -> None:
    model = built(lambda: Held(Unregistered, fields))
    model.initial_state = lambda batch: Unregistered(Net.initial_state(model, batch), 0)
    message = r"is a Unregistered: expected a tensor.*register its type as a pytree.*register_dataclass"
    for call in (sg.backward, sg.loss, sg.evaluate):
        with pytest.raises(sg.ModelError, match=message):
            call(model, TOKENS, chunk=CHUNK)
    assert all(p.grad is None for p in model.parameters())


def test_another_class_with_the_same_fields_is_refused() -> None:
    model = built(lambda: Held(Registered, fields))
    initial = model.initial_state(2)
    model.initial_state = lambda batch: initial
    model.make = lambda h, seen: Noted(h, seen)
    with pytest.raises(sg.ModelError, match="of another structure than it was given: expected a Registered, got a Not"):
        sg.backward(model, TOKENS, chunk=CHUNK)


def test_a_state_that_was_given_in_a_registered_class() -> None:
    """Its gradients come back in the same class, and those of its own leaves reach `.grad`."""
    model = built(lambda: Held(Registered, fields))
    h = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    state = Registered(h, sg.PrefixSum(torch.randn(2, 8, dtype=torch.float64)))
    expected = plain_grads(model, state=state) | {"h": h.grad}
    h.grad = None
    result = sg.backward(model, TOKENS, chunk=CHUNK, state=state)
    got = {name: p.grad for name, p in model.named_parameters()} | {"h": h.grad}
    require_exact(got, expected)
    assert isinstance(result.initial_state_grad, Registered)
    require_exact({"h": result.initial_state_grad.h}, {"h": expected["h"]})
