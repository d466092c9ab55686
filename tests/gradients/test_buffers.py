"""Gradients gather on stand-ins, in wide buffers, and reach each parameter once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.gradients.buffers import Gather
from tests.contract.contract import collect, plain, worst_error
from tests.toy_models import AllKinds, GatedRecurrence, Signals

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13


class Summed(nn.Module):
    """A language model around any layer that maps `[batch, time, width]` to the same, and sums over time after it."""

    def __init__(self, layer: nn.Module, width: int = 6, vocabulary: int = 13) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layer = layer
        self.head = nn.Linear(width, vocabulary)

    def initial_state(self, batch_size: int) -> sg.PrefixSum:
        return sg.PrefixSum(self.head.weight.new_zeros(batch_size, self.head.in_features))

    def forward(self, inputs: Tensor, state: sg.PrefixSum) -> tuple[Tensor, sg.PrefixSum]:
        x = torch.tanh(self.layer(self.embed(inputs)))
        before, following = state.advance(x.sum(1))
        return self.head(torch.tanh(before[:, None] + x.cumsum(1))), following


def require_exact(model: nn.Module, tokens: Tensor = TOKENS, **options: Any) -> None:
    """Chunked equals plain, in float64."""
    model = model.double()
    model.zero_grad()
    expected = plain(model, tokens, None)[1]
    result = sg.backward(model, tokens, chunk=7, **options)
    error, name = worst_error(collect(model, None, result.initial_state_grad), expected)
    assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured at most 1e-15


class OddLinears(nn.Module):
    """The weight of a linear product in every position and shape that torch allows."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(6, 6))
        self.row = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        named = F.linear(input=x, weight=self.square, bias=self.shift)
        whole = F.linear(x, self.square) + x @ self.square.t() + F.linear(x, self.square[:3].repeat(2, 1))
        return named + whole + F.linear(x, self.row)[..., None] + self.square.square().sum()


@pytest.mark.parametrize(
    "layer",
    [
        OddLinears,
        lambda: nn.Linear(6, 6, bias=False),
        lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6), nn.LayerNorm(6)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        lambda: nn.RMSNorm(6),
    ],
    ids=["odd linears", "no bias", "a stack", "weight norm", "RMS norm"],
)
def test_linear_layers_of_every_kind(layer: Any) -> None:
    require_exact(Summed(layer()))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 3}, {"scale_grad_by_freq": False, "padding_idx": 0}, {"padding_idx": -2}],
    ids=["plain", "padding", "first as padding", "padding from the end"],
)
def test_embeddings_of_every_kind(options: dict[str, Any]) -> None:
    model = Summed(nn.Identity())
    model.embed = nn.Embedding(13, 6, **options)
    require_exact(model)


def test_tied_weights_have_one_gradient() -> None:
    model = Summed(nn.Linear(6, 6))
    model.head.weight = model.embed.weight
    require_exact(model)
    assert len([name for name, _ in model.named_parameters() if name in ("embed.weight", "head.weight")]) == 1


class Cells(nn.Module):
    """torch's own recurrent layers, which hold a second list of their weights."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 5)
        self.rnn = kind(5, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 13)

    def initial_state(self, batch_size: int) -> Any:
        h = self.head.weight.new_zeros(2, batch_size, 4)
        return (h, h.clone()) if isinstance(self.rnn, nn.LSTM) else h

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = self.rnn(self.embed(inputs), state)
        return self.head(outputs), state


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_torchs_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    model = Cells(kind)
    # float32 too: its kernels for inference give other bits than those for training, which the sweep would refuse
    sg.backward(model, TOKENS, chunk=7)
    require_exact(model)
    flat = [id(w) for w in model.rnn._flat_weights]
    assert flat == [id(getattr(model.rnn, name)) for name in model.rnn._flat_weights_names]


def test_products_are_added_in_place_and_equal_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Summed(nn.Linear(6, 6)).double(), Counter()
    for name in ("add_product", "add_rows"):
        original = getattr(Gather, name)

        def counted(self: Gather, *args: Tensor, original: Any = original, name: str = name) -> None:
            calls[name] += 1
            original(self, *args)

        monkeypatch.setattr(Gather, name, counted)
    sg.backward(model, TOKENS, chunk=7)
    assert calls == {"add_product": 2 * 6, "add_rows": 6}  # two linear layers, one embedding, six chunks
    in_place = collect(model, None, None)
    monkeypatch.setattr(Gather, "adds_in_place", lambda self, stand_in: False)
    sg.backward(model, TOKENS, chunk=7)
    assert calls == {"add_product": 2 * 6, "add_rows": 6}
    error, name = worst_error(in_place, collect(model, None, None))
    assert error <= 1e-14, f"{name} is off by {error:.1e}"  # measured 3e-16


class InnerGradient(nn.Module):
    """A layer that takes a gradient of its own on the way, as test-time training does."""

    def __init__(self, create_graph: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.create_graph = create_graph

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.inner(x).square().sum(), x, create_graph=self.create_graph)
        return x - 0.1 * slope + self.inner(x)


class OnAStreamOfItsOwn(nn.Module):
    """As far as anybody asks which stream is the current one."""

    def __init__(self, current: list[str]) -> None:
        super().__init__()
        self.inner, self.current = nn.Linear(6, 6), current

    def forward(self, x: Tensor) -> Tensor:
        self.current.append("side")
        try:
            return self.inner(x)
        finally:
            self.current.pop()


def test_nothing_is_added_in_place_from_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd would not know of it: the next chunk might read the buffer before that stream has written it."""
    current, calls, swapped, add = ["main"], [0], Gather.swapped_into, Gather.add_product
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])

    @contextmanager
    def on_main(self: Gather, module: nn.Module) -> Iterator[None]:
        with swapped(self, module):
            self._streams = {TOKENS.device: "main"}  # on a CPU there are none
            yield

    def counted(self: Gather, *args: Tensor) -> None:
        calls[0] += 1
        add(self, *args)

    monkeypatch.setattr(Gather, "swapped_into", on_main)
    monkeypatch.setattr(Gather, "add_product", counted)
    require_exact(Summed(OnAStreamOfItsOwn(current)))
    assert calls == [6]  # the head's, in six chunks


@pytest.mark.parametrize("create_graph", [True, False])
def test_a_model_may_take_gradients_on_its_way(create_graph: bool) -> None:
    require_exact(Summed(InnerGradient(create_graph)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_add_up_in_float32(dtype: torch.dtype) -> None:
    """Many small gradients: the sum of the very same chunk gradients, in float64, is met to one rounding."""
    model = GatedRecurrence().to(dtype)
    tokens = torch.randint(0, 13, (1, 700))
    each: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    sg.backward(model, tokens, chunk=1, sink={name: gradients.append for name, gradients in each.items()})
    result = sg.backward(model, tokens, chunk=1)
    assert result.loss.dtype == torch.float32
    naive_errors = []
    for name, parameter in model.named_parameters():
        truth = torch.stack([g.double() for g in each[name]]).sum(0)
        assert parameter.grad.dtype == dtype
        got = (parameter.grad.double() - truth).norm() / truth.norm()
        naive = sum(each[name][1:], each[name][0])
        naive_errors.append(float((naive.double() - truth).norm() / truth.norm()))
        assert got <= torch.finfo(dtype).eps / 2, name  # half a unit in the last place: the one rounding at the end
    # what this prevents: adding in the narrow type was measured at 0.25 (bfloat16) and 0.02 (float16)
    assert max(naive_errors) > 10 * torch.finfo(dtype).eps


def test_wide_buffers_are_counted() -> None:
    model = nn.Linear(3, 5, dtype=torch.bfloat16)
    gather = Gather(dict(model.named_parameters()))
    assert gather.nbytes == 0
    with gather.swapped_into(model):
        model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    assert gather.nbytes == (15 + 5) * 4
    assert model.weight.grad is None
    assert gather.take()["weight"].dtype == torch.bfloat16


def test_frozen_and_unused_parameters_stay_without_gradient() -> None:
    model = Signals()
    inputs = {side: torch.randn(2, 11, 3) for side in ("left", "right")}
    sg.backward(model, inputs, torch.zeros(2, 11, dtype=torch.int64), chunk=4)
    absent = {name for name, p in model.named_parameters() if p.grad is None}
    assert absent == {"frozen.weight", "frozen.bias", "unused.weight", "unused.bias"}


def test_sinks_take_everything_and_leave_grad_alone() -> None:
    model = AllKinds().double()
    model.head.weight.register_hook(lambda g: pytest.fail("a hook ran"))
    received: dict[str, Tensor] = {}
    counts = Counter()

    def take(name: str, gradient: Tensor) -> None:
        assert not gradient.requires_grad
        received[name] = received.get(name, 0) + gradient
        counts[name] += 1

    sg.backward(model, TOKENS, chunk=7, sink={name: partial(take, name) for name, _ in model.named_parameters()})
    assert all(p.grad is None for p in model.parameters())
    expected = plain(without_hooks(model), TOKENS, None)[1]
    error, name = worst_error(received, {name: g for name, g in expected.items() if not name.startswith("state")})
    assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16
    assert counts["head.weight"] == 6  # once per chunk


def without_hooks(model: nn.Module) -> nn.Module:
    copy = type(model)().double()
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_sink_may_project_while_the_others_gather() -> None:
    model = GatedRecurrence().double()
    projection = torch.randn(6, 2, dtype=torch.float64)
    small = torch.zeros(13, 2, dtype=torch.float64)
    sg.backward(model, TOKENS, chunk=7, sink={"head.weight": lambda g: small.add_(g @ projection)})
    found = collect(model, None, None)
    expected = {name: g for name, g in plain(model, TOKENS, None)[1].items() if not name.startswith("state")}
    torch.testing.assert_close(
        small, expected.pop("head.weight") @ projection, rtol=1e-12, atol=1e-15
    )  # measured 2e-15
    error, name = worst_error(found, expected)
    assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16


def test_a_sink_of_no_parameter_is_refused() -> None:
    with pytest.raises(sg.InputError, match=r"sink: expected names of trainable parameters, got heat\.weight"):
        sg.backward(GatedRecurrence(), TOKENS, chunk=7, sink={"heat.weight": print})


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_hooks_see_the_whole_gradient_once(way: str, dtype: torch.dtype) -> None:
    model = Summed(nn.Linear(6, 6)).to(dtype)
    seen, after = Counter(), Counter()
    for name, parameter in model.named_parameters():

        def hook(gradient: Tensor, name: str = name) -> Tensor:
            seen[name] += 1
            return gradient * 2

        def post(parameter: Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            after[name] += 1

        parameter.register_hook(hook)
        parameter.register_post_accumulate_grad_hook(post)
    if way == "backward":
        sg.backward(model, TOKENS, chunk=7)
    else:
        sg.loss(model, TOKENS, chunk=7).backward()
    names = {name for name, _ in model.named_parameters()}
    assert seen == after == dict.fromkeys(names, 1)
    doubled = collect(model, None, None)
    free = Summed(nn.Linear(6, 6)).to(dtype)
    free.load_state_dict(model.state_dict())
    sg.backward(free, TOKENS, chunk=7)
    for name, parameter in free.named_parameters():
        assert torch.equal(doubled[name], parameter.grad * 2)


def test_gradients_add_to_those_that_are_there() -> None:
    model = GatedRecurrence()
    sg.backward(model, TOKENS, chunk=7)
    once = collect(model, None, None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mine = [parameter.grad for parameter in model.parameters()]
    sg.backward(model, TOKENS, chunk=7)
    for (name, parameter), grad in zip(model.named_parameters(), mine, strict=True):
        assert parameter.grad is grad  # in place, as autograd does it
        torch.testing.assert_close(parameter.grad, 1 + once[name], rtol=1e-6, atol=0)  # float32: one rounding


def test_a_model_gets_its_own_parameters_back() -> None:
    model = Cells(nn.GRU)
    before = [(id(owner), name, id(p)) for owner in model.modules() for name, p in owner._parameters.items()]
    sg.backward(model, TOKENS, chunk=7)
    with pytest.raises(ZeroDivisionError):
        sg.backward(model, TOKENS, chunk=7, loss_fn=lambda outputs, targets: 1 / 0)
    after = [(id(owner), name, id(p)) for owner in model.modules() for name, p in owner._parameters.items()]
    assert before == after
    assert all(type(p) is nn.Parameter for p in model.parameters())


# --- buffers: handed over, and no two in one memory ---


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("layer", [nn.Linear, nn.Identity, nn.RMSNorm], ids=lambda layer: layer.__name__)
def test_a_buffer_becomes_grad_and_is_not_copied(way: str, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Summed(layer(6, 6) if layer is nn.Linear else layer(6)).double()
    places: dict[str, int] = {}
    take = Gather.take

    def noted(self: Gather) -> dict[str, Tensor | None]:
        taken = take(self)
        places.update({name: g.data_ptr() for name, g in taken.items() if g is not None})
        return taken

    monkeypatch.setattr(Gather, "take", noted)
    if way == "backward":
        sg.backward(model, TOKENS, chunk=7)
    else:
        sg.loss(model, TOKENS, chunk=7).backward()
    assert places == {name: p.grad.data_ptr() for name, p in model.named_parameters()}
    assert len(set(places.values())) == len(places)


def test_torchs_own_call_copies() -> None:
    """Why `deliver` goes another way."""
    p, g = nn.Parameter(torch.zeros(3)), torch.ones(3)
    torch.autograd.backward([p], [g])
    assert p.grad.data_ptr() != g.data_ptr()


class Siblings(nn.Module):
    """Two parameters (or a parameter and the context) whose gradients autograd makes as views of one tensor."""

    def __init__(self, joined: str, with_context: bool) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 13)
        self.joined, self.with_context = joined, with_context

    def initial_state(self, batch_size: int) -> Tensor:
        return self.p.new_zeros(batch_size, 6)

    def forward(self, inputs: Tensor, state: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p, q = self.p, self.q if context is None else context
        if self.joined == "stack":
            both = torch.stack([p, q]).sum(0)
        elif self.joined == "cat":
            both = torch.cat([p, q]).view(2, 6).sum(0)
        else:
            both = p.view(-1) + q.view(-1)
        y = state[:, None] + torch.tanh(both * inputs[..., None]).cumsum(1)
        return self.head(y), y[:, -1]


def siblings_are_exact(joined: str, with_context: bool) -> None:
    model = Siblings(joined, with_context).double()
    context = torch.randn(6, dtype=torch.float64, requires_grad=True) if with_context else None
    outputs, _ = model(TOKENS, model.initial_state(2), context)
    (F.cross_entropy(outputs[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())).backward()

    def found() -> dict[str, Tensor]:
        gradients = collect(model, None, None)
        if context is not None:
            gradients, context.grad = gradients | {"context": context.grad}, None
        return gradients

    expected = found()
    for way in ("backward", "loss"):
        if way == "backward":
            sg.backward(model, TOKENS, context=context, chunk=7)
        else:
            sg.loss(model, TOKENS, context=context, chunk=7).backward()
        got = found()
        error, name = worst_error(got, expected)
        assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured at most 3e-16
        for name, g in got.items():
            assert g.untyped_storage().nbytes() == g.nbytes, f"{name} holds another's memory"


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("joined", ["stack", "cat", "view"])
def test_gradients_that_are_views_of_one_tensor(joined: str, with_context: bool) -> None:
    siblings_are_exact(joined, with_context)


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("joined", ["stack", "cat", "view"])
def test_views_would_be_added_to_twice(joined: str, with_context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation."""
    monkeypatch.setattr(Gather, "_owns", lambda self, leaf: True)
    with pytest.raises(AssertionError, match=r"is off by|holds another's memory"):
        siblings_are_exact(joined, with_context)


class Scaled(nn.Parameter):
    """A parameter of a class of its own."""


class Looks(nn.Module):
    """A layer that looks at its parameters: at an attribute, and at a class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.inner.weight.factor = 3.0
        self.scale = Scaled(torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.seen = True
        y = self.inner(x) * getattr(self.inner.weight, "factor", 1.0)
        return y * self.scale if isinstance(self.scale, Scaled) else y


def test_attributes_and_classes_of_parameters() -> None:
    layer = Looks()
    require_exact(Summed(layer))
    assert layer.inner.weight.seen
