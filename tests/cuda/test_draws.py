"""Dropout on the device: both sweeps draw alike, a seed gives the same bits, and the user's generators stay put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimgrad as sg
from slimgrad.sweep.random import generators
from tests.contract import contract
from tests.contract.cases import tokens
from tests.cuda.device import DEVICE, IS_CUDA, MODELS, PLACES, SCHEDULES, different, gradients, moved, on_device
from tests.toy_models import AllKinds, GatedRecurrence

TYPES: dict[str, Callable[..., nn.Module]] = {"gated": GatedRecurrence, "all kinds": AllKinds}
CALLS = {
    "backward": lambda *args, **options: sg.backward(*args, **options),
    "loss": lambda *args, **options: sg.loss(*args, **options).backward(),
    "token_loss": lambda *args, **options: sg.token_loss(*args, **options).mean().backward(),
    "outputs": lambda *args, **options: sg.outputs(*args, **options).square().sum().backward(),
    "evaluate": lambda *args, **options: sg.evaluate(*args, **options),
}


def drawing(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return TYPES[kind](dropout=0.3).to(DEVICE, dtype)


@pytest.mark.parametrize("way", contract.WAYS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
def test_draws_are_replayed(kind: str, schedule: str, way: str) -> None:
    model = TYPES[kind]().to(DEVICE, torch.float64)
    contract.check_draws(model, moved(tokens()), chunk=10, schedule=SCHEDULES[schedule](), way=way)


@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_torchs_own_dropout_is_drawn_alike_in_both_sweeps(kind: str, dtype: torch.dtype, store: str) -> None:
    """Its kernels draw by the shape of their grid. Other draws would give the state other bits, which is refused."""
    for way in ("backward", "loss"):
        CALLS[way](drawing(kind, dtype), moved(tokens()), chunk=10, schedule=sg.Binomial(3, store=store))


@pytest.mark.parametrize("call", CALLS)
def test_the_generators_are_where_they_were(call: str) -> None:
    model, inputs = drawing("all kinds"), moved(tokens())
    of_device = generators(DEVICE)[-1]
    torch.rand(7, device=DEVICE)
    before, cpu = of_device.get_state(), torch.get_rng_state()
    CALLS[call](model, inputs, chunk=10)
    if IS_CUDA:
        assert torch.equal(of_device.get_state(), before)
    torch.set_rng_state(cpu)
    torch.randint(-(1 << 63), (1 << 63) - 1, ())
    expected = torch.rand(3)
    torch.set_rng_state(cpu)
    CALLS[call](model, inputs, chunk=10)
    assert torch.equal(torch.rand(3), expected)  # one draw of the CPU's generator a call


def test_the_generators_are_where_they_were_after_an_error() -> None:
    model, of_device = drawing("gated"), generators(DEVICE)[-1]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError

    before = of_device.get_state()
    with pytest.raises(KeyError):
        sg.evaluate(model, moved(tokens()), chunk=10, loss_fn=loss_fn)
    if IS_CUDA:
        assert torch.equal(of_device.get_state(), before)


def test_a_device_without_an_index_is_the_current_one() -> None:
    with_index = torch.empty(0, device=DEVICE).device
    assert generators(torch.device(DEVICE.type)) == generators(with_index)


@pytest.mark.parametrize("call", ["backward", "loss"])
@pytest.mark.parametrize("kind", TYPES)
def test_one_seed_gives_the_same_loss(kind: str, call: str) -> None:
    model, inputs = drawing(kind, torch.float32), moved(tokens())
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(sg.loss(model, inputs, chunk=10).detach())
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("name", [*MODELS])
def test_a_gradient_is_the_same_twice_wherever_the_plain_one_is(name: str) -> None:
    """A kernel that adds in any order gives other bits each time: plain backpropagation has few of these."""
    torch.manual_seed(5)
    model, inputs, targets = on_device(MODELS[name])()
    if not isinstance(inputs, dict):
        inputs = inputs.repeat(1, 8)  # many of the same token: their gradients meet in one row
        targets = None
    else:
        inputs, targets = {side: x.repeat(1, 8, 1) for side, x in inputs.items()}, targets.repeat(1, 8)
    if name == "growing sums":
        pytest.skip("its keys grow with the length, beyond float64 at this one")
    model = model.float()
    inputs = {s: x.float() for s, x in inputs.items()} if isinstance(inputs, dict) else inputs

    def once(way: str) -> dict[str, Tensor | None]:
        torch.manual_seed(6)
        if way == "plain":
            outputs, _ = model(inputs, model.initial_state(2))
            contract.plain_loss(outputs, contract.explicit(inputs, targets)).backward()
        else:
            CALLS[way](model, inputs, targets, chunk=300)
        return gradients(model)

    plain = [once("plain") for _ in range(4)]
    varying = {n for other in plain[1:] for n in different(other, plain[0])}
    for way in ("backward", "loss"):
        found = [once(way) for _ in range(4)]
        changed = {n for other in found[1:] for n in different(other, found[0])}
        assert not changed - varying, f"{way}: {sorted(changed - varying)} differ from call to call, in plain {varying}"


class Checkpointed(AllKinds):
    """Runs itself again in its backward pass, which on CUDA is in autograd's thread."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        return checkpoint(super().forward, inputs, state, use_reentrant=False)


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("schedule", ["Rebuild", "Binomial"])
def test_activation_checkpointing(schedule: str, way: str) -> None:
    torch.manual_seed(3)
    model = AllKinds(dropout=0.3).to(DEVICE, torch.float64)
    again = Checkpointed(dropout=0.3).to(DEVICE, torch.float64)
    again.load_state_dict(model.state_dict())
    inputs, found = moved(tokens()), []
    for one in (model, again):
        torch.manual_seed(6)
        CALLS[way](one, inputs, chunk=10, schedule=SCHEDULES[schedule]())
        found.append({n: g for n, g in gradients(one).items() if g is not None})
    error, name = contract.worst_error(found[1], found[0])
    assert error <= contract.TOLERANCE, (name, error)


class Recurrent(nn.Module):
    """torch's own recurrent layers: cuDNN's on CUDA."""

    def __init__(self, kind: str, dropout: float = 0.0, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.rnn = getattr(nn, kind)(width, width, num_layers=2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, 13)
        self.layers, self.width, self.has_cell = 2, width, kind == "LSTM"

    def initial_state(self, batch_size: int) -> Any:
        zeros = self.head.weight.new_zeros(self.layers, batch_size, self.width)
        return (zeros, zeros.clone()) if self.has_cell else (zeros,)

    def forward(self, inputs: Tensor, state: Any) -> Any:
        y, following = self.rnn(self.embed(inputs), state if self.has_cell else state[0])
        return self.head(y), following if self.has_cell else (following,)


@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers(kind: str, store: str) -> None:
    def build() -> Any:
        torch.manual_seed(3)
        return Recurrent(kind).to(DEVICE, torch.float64), moved(tokens()), None

    for way in ("backward", "loss"):
        contract.check(build, chunk=16, way=way, schedule=sg.Keep(store=store))


@pytest.mark.parametrize("way", ["backward", "loss"])
def test_dropout_between_recurrent_layers_is_replayed_or_refused(way: str) -> None:
    """cuDNN draws it from a state of its own, which no seed brings back."""
    torch.manual_seed(3)
    model = Recurrent("LSTM", dropout=0.5).to(DEVICE, torch.float64)
    inputs, found = moved(tokens()), []
    try:
        for _ in range(2):
            torch.manual_seed(6)
            CALLS[way](model, inputs, chunk=16)
            found.append(gradients(model))
    except (sg.StateMismatchError, sg.LossMismatchError) as error:
        print(error)
    if len(found) == 2:
        assert different(*found) == []
    else:
        assert IS_CUDA
        assert all(p.grad is None for p in model.parameters())


def test_draws_within_attention() -> None:
    """Scaled dot product attention with dropout: its kernels draw on their own."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.head = nn.Embedding(13, 64), nn.Linear(64, 192), nn.Linear(64, 13)

        def initial_state(self, batch_size: int) -> Any:
            return sg.PrefixSum(torch.zeros(batch_size, 64, dtype=torch.float32, device=DEVICE))

        def forward(self, inputs: Tensor, state: sg.PrefixSum) -> Any:
            q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in self.qkv(self.embed(inputs)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2).transpose(1, 2).flatten(2)
            before, following = state.advance(y.float().sum(1))
            return self.head(y + before[:, None].to(y.dtype) / 64), following

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        model = Attending().to(DEVICE, dtype)
        for schedule in (sg.Rebuild(), sg.Binomial(2)):
            for way in ("backward", "loss"):
                CALLS[way](model, moved(tokens()), chunk=32, schedule=schedule)
