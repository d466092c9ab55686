"""Kinds of state are open: two that are defined here, and nowhere known, go through everything that the library does.

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
from tests.contract.contract import Gradients, collect, plain_loss, worst_error

TOKENS = torch.arange(2 * 67).reshape(2, 67) * 7 % 13
TARGETS = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
COUNT = int((TARGETS != -100).sum())
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(3), sg.Binomial(2, store="disk")]
EXACT = 1e-12  # measured over all tests here: at most 2e-15


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
        self.gradient: Tensor | None = None

    def checksum(self) -> Tensor:
        return checksum(self.live if self.after is None else self.after)

    def roots(self) -> list[Root]:
        if self.after is None or self.gradient is None or not self.after.requires_grad:
            return []
        return [Root(self.after, self.gradient)]

    def sources(self) -> list[Tensor]:
        return [self.leaf] if self.leaf is not None and self.leaf.requires_grad else []

    def _settle(self) -> None:
        assert self.leaf is not None
        assert self.after is not None
        if self.reverses:
            self.gradient = self.leaf.grad
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

    def adjoint(self) -> Tensor | None:
        return self.gradient

    def set_adjoint(self, gradient: Tensor | None) -> None:
        self.gradient = gradient

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "live": self.live.clone(), "gradient": self.gradient}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position, self.live, self.gradient = state["position"], state["live"], state["gradient"]


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


def gradients(model: nn.Module) -> Gradients:
    return collect(model, None, None)


def truth() -> Gradients:
    """Plain backpropagation through one call."""
    model = built()
    outputs, _ = model(TOKENS, model.initial_state(2))
    plain_loss(outputs, TARGETS).backward()
    return gradients(model)


def require_close(got: Gradients, expected: Gradients) -> None:
    error, name = worst_error(got, expected)
    assert error < EXACT, name


# --- exact, by every way in ---


@pytest.mark.parametrize("schedule", [None, *SCHEDULES], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("chunk", [1, 8, 66, 67, 99])
def test_backward(chunk: int, schedule: sg.Schedule | None) -> None:
    model = built()
    sg.backward(model, TOKENS, chunk=chunk, schedule=schedule)
    require_close(gradients(model), truth())


def test_every_other_way_in() -> None:
    ways: list[Callable[[nn.Module], Tensor]] = [
        lambda model: sg.loss(model, TOKENS, chunk=8),
        lambda model: sg.token_loss(model, TOKENS, chunk=8).sum() / COUNT,
        lambda model: plain_loss(sg.outputs(model, TOKENS, chunk=8), TARGETS),
        lambda model: sg.Chunked(model, chunk=8)(TOKENS),
    ]
    for way in ways:
        model = built()
        way(model).backward()
        require_close(gradients(model), truth())


def test_draws_are_repeated() -> None:
    """Under any schedule the same, though chunks are run again from states that were kept or turned back."""
    found = []
    for schedule in SCHEDULES:
        model = built(dropout=0.2)
        torch.manual_seed(5)
        sg.backward(model, TOKENS, chunk=8, schedule=schedule)
        found.append(gradients(model))
    for other in found[1:]:
        require_close(other, found[0])


def test_evaluate_and_verify() -> None:
    model = built()
    with torch.no_grad():
        _, final = model(TOKENS, model.initial_state(2))
    found = sg.evaluate(model, TOKENS, chunk=8).final_state
    assert isinstance(found["decayed"], Decayed)
    assert found["decayed"].rate == 0.97
    torch.testing.assert_close(found["decayed"].value, final["decayed"].value, rtol=0, atol=1e-15)
    assert torch.equal(found["turned"][0].value, final["turned"][0].value)
    assert sg.verify(model, TOKENS, chunk=8).ok


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_carried_from_part_to_part(schedule: sg.Schedule) -> None:
    """The second part begins with the state of the first, and gives its gradient back; both take part in autograd."""
    model = built()
    first = sg.Segment(model, TOKENS[:, :30], TARGETS[:, :30], chunk=8, schedule=schedule)
    second = sg.Segment(model, TOKENS[:, 30:], TARGETS[:, 30:], chunk=8, schedule=schedule, state=first.forward())
    second.forward()
    back = second.reverse(1 / COUNT)
    assert back.initial_state_grad["turned"][0].shape == (2, 5)
    first.reverse(1 / COUNT, back.initial_state_grad)
    require_close(gradients(model), truth())


def test_a_ring_that_goes_back_is_not_kept() -> None:
    """Rebuild keeps the sum that forgets once a chunk, and no ring; Keep keeps both."""
    held = {}
    for schedule in (sg.Rebuild(), sg.Keep()):
        events: list[sg.Event] = []
        sg.backward(built(), TOKENS, chunk=8, schedule=schedule, on_chunk=events.append)
        held[type(schedule)] = max(event.held_bytes for event in events)
    row = 128  # 2 x 5 doubles, to whole 64 bytes
    assert held[sg.Keep] - held[sg.Rebuild] >= 7 * row  # the ring in as many slots as there are chunks but one
    assert held[sg.Rebuild] >= 7 * row


# --- saved, sent, split ---


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_saved_at_every_step(schedule: sg.Schedule, tmp_path: Path) -> None:
    folders: list[Path] = []

    def save(_: object = None) -> None:
        folders.append(tmp_path / str(len(folders)))
        one.save(folders[-1])

    model = built(dropout=0.2)
    one = sg.Segment(model, TOKENS, chunk=8, schedule=schedule, on_chunk=save)
    save()
    one.forward()
    save()
    final = one.reverse().final_state
    expected = gradients(model)
    for folder in folders:
        model = built(dropout=0.2)
        again = sg.Segment.load(folder, model, TOKENS)
        again.forward()
        result = again.reverse()
        found = gradients(model)
        assert [name for name, g in expected.items() if not torch.equal(g, found[name])] == []
        assert isinstance(result.final_state["decayed"], Decayed)
        assert torch.equal(result.final_state["decayed"].value, final["decayed"].value)


def test_sent_with_all_that_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind's own form, by way of `with_value` and pickle: the rate arrives too."""
    line: list[bytes] = []

    def send_objects(objects: list[Any], **_: Any) -> None:
        line.append(pickle.dumps(objects))

    def receive_objects(objects: list[Any], **_: Any) -> None:
        objects[:] = pickle.loads(line.pop(0))

    def send(x: Tensor, **_: Any) -> None:
        line.append(bytes(x.tolist()))

    def receive(x: Tensor, **_: Any) -> None:
        x.copy_(torch.tensor(list(line.pop(0)), dtype=torch.uint8))

    for name, function in {
        "send_object_list": send_objects, "recv_object_list": receive_objects, "send": send, "recv": receive
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.distributed, name, function)
    state = {"decayed": Decayed(torch.randn(2, 5), 0.9), "turned": [Turned(torch.randn(3).double())]}
    assert sg.send_state(state, to=1) == 2 * 5 * 4 + 3 * 8
    got = sg.receive_state(source=0)
    assert (type(got["decayed"]), got["decayed"].rate) == (Decayed, 0.9)
    assert torch.equal(got["decayed"].value, state["decayed"].value)
    assert torch.equal(got["turned"][0].value, state["turned"][0].value)
    assert line == []


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("phase", ["first sweep", "second sweep"])
def test_chunks_that_do_not_fit_are_taken_in_parts(phase: str, schedule: sg.Schedule) -> None:
    tokens, limit = TOKENS.repeat(1, 3), 200
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)

    class Limited(Both):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            found = super().forward(inputs, state)
            if inputs.shape[1] > limit:
                raise MemoryError
            return found

    def on_chunk(event: sg.Event) -> None:
        nonlocal limit
        if phase == "first sweep" and event.stop == 64 or event.phase == "reverse":
            limit = 20

    model, expected = built(), built()
    model.__class__ = Limited
    outputs, _ = expected(tokens, expected.initial_state(2))
    plain_loss(outputs, targets).backward()
    events: list[sg.Event] = []
    sg.backward(model, tokens, chunk=64, schedule=schedule, on_chunk=lambda e: (events.append(e), on_chunk(e)))
    assert {e.stop - e.start for e in events if e.phase == "reverse"} & {16}
    require_close(gradients(model), gradients(expected))


# --- refused ---


def test_another_leaf_in_its_place_is_refused() -> None:
    class Forgets(Both):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            outputs, following = super().forward(inputs, state)
            return outputs, following | {"decayed": following["decayed"].value}

    with pytest.raises(sg.ModelError, match=r"state \['decayed'\]: expected the object that"):
        sg.backward(Forgets(), TOKENS, chunk=8)


def test_a_ring_that_turns_otherwise_on_the_way_back_is_noticed() -> None:
    class Restless(Both):
        calls = 0

        def forward(self, inputs: Tensor, state: Any) -> Any:
            self.calls += 1
            before, turned = state["turned"][0].turn(self.calls)
            outputs, following = super().forward(inputs, state | {"turned": [Turned(before)]})
            return outputs, following | {"turned": [turned]}

    with pytest.raises(sg.SlimgradError, match=r"calls|state \['turned'\]\[0\].* other bits"):
        sg.backward(Restless(), TOKENS, chunk=8)
