"""Two kinds of state as a user defines them, and a model that reads one of each beside a sum.

`Decayed` forgets, so it is kept whole. `Turned` goes back by itself: it is turned by known steps, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.states.base import Carrier, Root, Setting, State
from slimgrad.states.checksum import checksum
from slimgrad.sweep.store import Handle, Store


class Decayed(State):
    """`S <- rate S + x` for each token."""

    def __init__(self, value: Tensor, rate: float) -> None:
        super().__init__(value)
        self.rate = rate

    def move(self, within: Tensor, tokens: int) -> tuple[Tensor, Decayed]:
        """The sum before the chunk, and the state after its tokens, which come to `within` by themselves."""
        return self.value, self.with_value(self.rate**tokens * self.value + within)

    def with_value(self, value: Tensor) -> Decayed:
        return Decayed(value, self.rate)

    def carrier(self, setting: Setting) -> DecayedCarrier:
        return DecayedCarrier(setting, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Decayed, (self.value, self.rate)


class Turned(State):
    """A ring that is turned by a number of places."""

    def turn(self, places: int) -> tuple[Tensor, Turned]:
        """The ring before the chunk, and the state that follows."""
        if self._link is not None:
            return self._link.turn(places)
        return self.value, Turned(self.value.roll(places, -1))

    def carrier(self, setting: Setting) -> TurnedCarrier:
        return TurnedCarrier(setting, self)


class Whole(Carrier):
    """What both carriers have in common: a tensor, the leaf of the chunk's graph that stands for it, its adjoint."""

    def __init__(self, setting: Setting, initial: State) -> None:
        super().__init__(setting)
        self._rolls_back = self.rolls_back and setting.rolls_back
        self.initial, self.live = initial, initial.value.detach().clone()
        self.leaf: Tensor | None = None
        self.after: Tensor | None = None

    def checksum(self) -> Tensor:
        return checksum(self.live if self.after is None else self.after)

    def roots(self) -> list[Root]:
        if self.after is None or self._adjoint is None or not self.after.requires_grad:
            return []
        return [Root(self.after, self._adjoint)]

    def sources(self) -> list[Tensor]:
        return [self.leaf] if self.leaf is not None and self.leaf.requires_grad else []

    def _settle(self) -> None:
        assert self.leaf is not None
        assert self.after is not None
        if self.reverses:
            self._adjoint = self.leaf.grad
        before = self.position == self.span.start
        self.live = self.leaf.detach() if before else self.after.detach().clone()
        self.leaf = self.after = None

    def rewind(self) -> None:
        self.leaf = self.after = None

    def keep(self, store: Store, *, whole: bool) -> Handle | None:
        return store.put(self.index, self.live) if whole or not self._rolls_back else None

    def load(self, store: Store, token: Handle, position: int) -> None:
        self.live, self.position = store.get(token).clone(), position

    def drop(self, store: Store, token: Handle) -> None:
        store.free(token)

    def fetch(self, store: Store, token: Handle) -> None:
        store.fetch(token)

    def pack(self, token: Handle) -> Any:
        return tuple(token)

    def unpack(self, packed: Any) -> Handle:
        return Handle(*packed)

    def final(self) -> State:
        return self.initial.with_value((self.live if self.after is None else self.after).detach().clone())

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "live": self.live.clone(), "gradient": self._adjoint}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position, self.live, self._adjoint = state["position"], state["live"], state["gradient"]


class DecayedCarrier(Whole):
    def _bind(self) -> State:
        self.leaf = self.live.detach().requires_grad_(torch.is_grad_enabled())
        return self.initial.with_value(self.leaf)

    def take(self, returned: Any) -> None:
        if not isinstance(returned, Decayed):
            raise self.wrong(returned)
        self.after = returned.value


class TurnedCarrier(Whole):
    following: Turned | None = None

    @property
    def rolls_back(self) -> bool:
        return True

    def _bind(self) -> State:
        self.following = None
        self.bound = Turned(self.live, _link=self)
        return self.bound

    def turn(self, places: int) -> tuple[Tensor, Turned]:
        before = self.live if self.position == self.span.start else self.live.roll(-places, -1)
        self.leaf = before.detach().requires_grad_(torch.is_grad_enabled())
        self.after = self.leaf.roll(places, -1)
        self.following = Turned(self.after)
        return self.leaf, self.following

    def take(self, returned: Any) -> None:
        if self.following is None or returned is not self.following:
            raise self.wrong(returned)


class Both(nn.Module):
    """Reads one of each kind beside a sum, and draws."""

    def __init__(self, width: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(13, width), nn.Linear(width, width), nn.Linear(width, 13)
        self.dropout, self.ring = nn.Dropout(dropout), nn.Parameter(torch.randn(width))

    def initial_state(self, batch_size: int) -> dict[str, Any]:
        zeros = self.head.weight.new_zeros(batch_size, self.head.in_features)
        return {
            "decayed": Decayed(zeros, 0.97),
            "turned": [Turned(torch.tanh(self.ring).expand(batch_size, -1))],
            "sum": sg.PrefixSum(zeros),
        }

    def forward(self, inputs: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        x, rate, time = torch.tanh(self.mix(self.dropout(self.embed(inputs)))), 0.97, inputs.shape[1]
        within, steps = torch.zeros_like(x[:, 0]), []
        for t in range(time):
            within = rate * within + x[:, t]
            steps.append(within)
        before, decayed = state["decayed"].move(within, time)
        decays = rate ** torch.arange(1, time + 1, dtype=x.dtype)
        ring, turned = state["turned"][0].turn(time)
        rings = torch.stack([ring.roll(t, -1) for t in range(1, time + 1)], 1)
        summed, sums = state["sum"].advance(x.sum(1))
        y = torch.stack(steps, 1) + decays[:, None] * before[:, None]
        y = y + rings * x + (summed[:, None] + x.cumsum(1)) / 67
        return self.head(y), {"decayed": decayed, "turned": [turned], "sum": sums}


def built(dropout: float = 0.0) -> Both:
    torch.manual_seed(3)
    return Both(dropout=dropout).double()
