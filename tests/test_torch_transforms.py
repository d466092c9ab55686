"""Models that torch itself transforms: compiled, vmapped, parametrised, pruned, called with other weights.

Each gradient equals plain backpropagation in float64, or is refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

import slimgrad as sg
from tests.contract.kinds import CHUNK, TOKENS, Grads, Net, both_ways, built, grads, plain_grads, refused, require_exact
from tests.toy_models import LinearAttention

SHAPES = 2  # 40 tokens in chunks of 9: four of them and one of 4

# Dynamo reads the .grad of every input, and instantiates what it traces; inductor imports TorchScript
compiles = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor",
    "ignore:.*Function.* should not be instantiated",
    "ignore:`torch.jit.script",
)


# --- torch.compile ---


class Head(nn.Sequential):
    """Not torch's own type: those are left alone by `nn.Module.compile`."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 11))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sinh()


class Blocks(Net):
    """Its head is a module of its own, to be compiled, and its recurrence calls a step that may be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head().double()
        self.step = step

    def initial_state(self, batch_size: int) -> Any:
        return self.mix.weight.new_zeros(batch_size, 8)

    def roll(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(x, h, self.mix.weight, self.mix.bias)


def step(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    steps = []
    for t in range(x.shape[1]):
        h = 0.9 * h + torch.tanh(F.linear(h, weight, bias) + x[:, t])
        steps.append(h)
    return torch.stack(steps, 1), h


def compiled(what: str, backend: str = "aot_eager") -> nn.Module:
    model: Any = built(Blocks)
    if what == "model":
        return torch.compile(model, backend=backend)
    if what == "model in place":
        model.compile(backend=backend)
    if what == "layer":
        model.head = torch.compile(model.head, backend=backend)
    if what == "layer in place":
        model.head.compile(backend=backend)
    if what == "step":
        model.step = torch.compile(step, backend=backend)
    return model


def names_of_the_original(found: Grads) -> Grads:
    return {name.replace("_orig_mod.", ""): g for name, g in found.items()}


@pytest.fixture
def num_compiled() -> Generator[Callable[[], int]]:
    """How many graphs were compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize("what", ["model", "model in place", "layer", "layer in place", "step"])
def test_compiled_is_exact_and_compiled_once_for_each_shape(what: str, num_compiled: Callable[[], int]) -> None:
    expected, model = plain_grads(built(Blocks)), compiled(what)
    for _ in range(2):
        sg.backward(model, TOKENS, chunk=CHUNK)
        require_exact(names_of_the_original(grads(model)), expected)
        sg.loss(model, TOKENS, chunk=CHUNK).backward()
        require_exact(names_of_the_original(grads(model)), expected)
        assert num_compiled() == SHAPES


@compiles
def test_a_chunk_runs_one_graph_in_both_sweeps() -> None:
    """Left alone, Dynamo puts a graph for any length in the place of the first, as soon as a shorter chunk comes."""
    torch._dynamo.reset()
    ran: list[int] = []
    graphs = itertools.count()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        number = next(graphs)

        def run(*args: Any) -> Any:
            ran.append(number)
            return graph(*args)

        return run

    model: Any = built(Blocks)
    expected = plain_grads(model)
    model.head = torch.compile(model.head, backend=backend)
    for _ in range(2):
        ran.clear()
        sg.loss(model, TOKENS, chunk=CHUNK).backward()
        require_exact(names_of_the_original(grads(model)), expected)
        assert ran[-5:] == [1, 0, 0, 0, 0]
        assert ran[-10:-5] == [0, 0, 0, 0, 1]


@compiles
@pytest.mark.slow
def test_inductor_at_a_length_that_is_no_multiple_of_the_chunk(num_compiled: Callable[[], int]) -> None:
    tokens = TOKENS[:, :13]
    expected, model = plain_grads(built(Blocks), inputs=tokens), compiled("step", "inductor")
    for _ in range(2):
        for schedule in (sg.Rebuild(), sg.Binomial(1)):
            sg.loss(model, tokens, chunk=5, schedule=schedule).backward()
            require_exact(grads(model), expected)
            assert num_compiled() == SHAPES


@compiles
def test_compiled_around_chunked() -> None:
    torch._dynamo.reset()
    model = built(Net)
    expected = plain_grads(model)
    chunked = torch.compile(sg.Chunked(model, chunk=CHUNK), backend="aot_eager")
    for _ in range(2):
        chunked(TOKENS).backward()
        require_exact(grads(model), expected)


@compiles
@pytest.mark.parametrize("in_place", [True, False])
def test_forward_serves_both_sweeps_where_a_part_is_compiled(in_place: bool) -> None:
    """`advance` is not compiled where forward is, and would differ in bits."""
    torch._dynamo.reset()
    model = built(lambda: LinearAttention(vocabulary=11).double())
    expected = plain_grads(model)
    calls = []
    model.advance = lambda *args: calls.append(args) or LinearAttention.advance(model, *args)
    sg.backward(model, TOKENS, chunk=CHUNK)
    require_exact(grads(model), expected)
    assert len(calls) == 4  # the last chunk needs no advance
    if in_place:
        model.qkv.compile(backend="aot_eager")
    else:
        model.qkv = torch.compile(model.qkv, backend="aot_eager")
    calls.clear()
    sg.backward(model, TOKENS, chunk=CHUNK)
    require_exact(names_of_the_original(grads(model)), expected)
    assert not calls


# --- functions of torch.func, and modes ---


class Around(Net):
    """Something of torch's around a layer that the recurrence uses as well."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor], prepare: Any = None) -> None:
        super().__init__()
        self.how = how
        if prepare is not None:
            prepare(self)
            self.double()

    def forward(self, tokens: Tensor, h: Tensor) -> Any:
        y, h = self.roll(self.embed(tokens), h)
        return self.head(y + self.how(self.mix, y)), h


def squares(layer: nn.Module, y: Tensor) -> Tensor:
    return layer(y).square().sum()


def with_own_weights(layer: nn.Module, y: Tensor) -> Tensor:
    return torch.func.functional_call(layer, dict(layer.named_parameters()), (y,))


AROUND: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda layer, y: torch.vmap(layer)(y),
    "func.grad": lambda layer, y: torch.func.grad(partial(squares, layer))(y),
    "func.grad in vmap": lambda layer, y: torch.vmap(torch.func.grad(partial(squares, layer)))(y),
    "func.jvp": lambda layer, y: torch.func.jvp(lambda x: layer(x).tanh(), (y,), (y * y,))[1],
    "func.vjp": lambda layer, y: torch.func.vjp(layer, y)[1](y)[0],
    "functional_call with its own weights": with_own_weights,
    "the weight by hand": lambda layer, y: F.linear(y, layer.weight) + y @ layer.weight + layer(y) + layer.bias,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own, in forward-mode differentiation
@pytest.mark.parametrize("name", AROUND)
def test_torch_functions_around_a_layer(name: str) -> None:
    model = built(partial(Around, AROUND[name]))
    both_ways(None, model, plain_grads(model))


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["around the call", "within forward"])
def test_a_torch_function_mode(where: str) -> None:
    mode = Counting()

    def within(layer: nn.Module, y: Tensor) -> Tensor:
        with mode:
            return layer(y)

    model = built(partial(Around, within if where == "within forward" else lambda layer, y: layer(y)))
    expected = plain_grads(model)
    mode.count = 0
    if where == "within forward":
        both_ways(None, model, expected)
    else:
        with mode:
            both_ways(None, model, expected)
    assert mode.count >= 4 + 3 * 5  # `backward` need not run the last chunk forward


# --- weights that are made of others ---


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).t()


def parametrised(model: Any) -> None:
    parametrize.register_parametrization(model.mix, "weight", Symmetric())


def tied_and_parametrised(model: Any) -> None:
    parametrised(model)
    model.also = nn.Linear(8, 8)
    model.also.weight = model.mix.parametrizations.weight.original


def by_hook(model: Any) -> None:
    nn.utils.weight_norm(model.mix)


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.mix, "weight", amount=0.3)
    prune.random_unstructured(model.head, "weight", amount=9)
    prune.random_unstructured(model.head, "bias", amount=2)


def with_a_bias_that_is_no_parameter(model: Any) -> None:
    bias = model.head.bias.detach().clone()
    del model.head.bias
    model.head.register_buffer("bias", bias)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "prepare", [parametrised, tied_and_parametrised, by_hook, pruned, with_a_bias_that_is_no_parameter]
)
def test_weights_that_are_made_of_others(prepare: Any, cached: bool) -> None:
    def twice(layer: nn.Module, y: Tensor) -> Tensor:
        if not cached:
            return layer(y) + F.linear(y, layer.weight)
        with parametrize.cached():
            return layer(y) + F.linear(y, layer.weight)

    model = built(partial(Around, twice, prepare))
    expected = plain_grads(model)
    both_ways(None, model, expected)
    if cached:
        with parametrize.cached():
            both_ways(None, model, expected)


def test_a_cache_of_weights_from_outside_is_not_used() -> None:
    """Filled before the call: what it holds has the graph of the real weights."""
    model = built(partial(Around, lambda layer, y: layer(y), parametrised))
    expected = plain_grads(model)
    with parametrize.cached():
        held = model.mix.weight
        both_ways(None, model, expected)
        assert model.mix.weight is held


def test_layers_and_their_weights_read_by_hand_on_one_tied_weight() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = self.embed.weight
            self.again = nn.Linear(8, 11, bias=False)
            self.again.weight = self.embed.weight

        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            x = self.embed(tokens) + F.embedding(tokens, self.head.weight)
            y, h = self.roll(x, h)
            return self.head(y) + self.again(y.tanh()) + F.linear(y, self.embed.weight) + y @ self.head.weight.t(), h

    model = built(Tied)
    both_ways(None, model, plain_grads(model))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("sparse_first", [False, True])
def test_a_sparse_embedding_tied_to_a_dense_layer(sparse_first: bool, by_hand: bool) -> None:
    """Where the last chunk leaves the layer out, the sparse gradient comes before the dense one."""

    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(11, 8, sparse=True, dtype=torch.float64)
            self.tied = nn.Linear(8, 11, dtype=torch.float64)
            self.tied.weight = self.rows.weight

        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            y, h = self.roll(self.embed(tokens) + self.rows(tokens), h)
            if sparse_first and tokens.shape[1] != CHUNK:
                return self.head(y), h
            z = F.linear(y, self.tied.weight, self.tied.bias) if by_hand else self.tied(y)
            return self.head(y) + z, h

    model = built(Sparse)
    both_ways(None, model, plain_grads(model, chunk=CHUNK))


# --- layers whose kernels depend on what requires a gradient ---


class Attending(Net):
    """Attention within each chunk, and a recurrence over what it gives: `inner` is one of torch's own."""

    def __init__(self, inner: Callable[[], nn.Module], frozen: bool) -> None:
        super().__init__()
        self.inner = inner().double().requires_grad_(not frozen)

    def forward(self, tokens: Tensor, h: Tensor) -> Any:
        x, mask = self.embed(tokens), torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        if isinstance(self.inner, nn.MultiheadAttention):
            x = self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]
        else:
            x = self.inner(x, src_mask=mask)
        y, h = self.roll(x, h)
        return self.head(y), h


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("all_frozen", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
    ],
    ids=["attention", "encoder layer"],
)
def test_layers_with_kernels_for_inference(
    inner: Callable[[], nn.Module], frozen: bool, all_frozen: bool, mode: str
) -> None:
    model = built(partial(Attending, inner, frozen))
    if all_frozen:
        model.embed.requires_grad_(False)
    model.train(mode == "train")
    both_ways(None, model, plain_grads(model, chunk=CHUNK))


def test_bfloat16_parameters() -> None:
    model, exact = built(Net).bfloat16(), built(Net)
    exact.load_state_dict(model.state_dict())
    truth = plain_grads(exact)
    plain = distances(plain_grads(model), truth)
    sg.backward(model, TOKENS, chunk=CHUNK)
    found = grads(model)
    assert {g.dtype for g in found.values()} == {torch.bfloat16}
    got = distances(found, truth)
    print(got, plain)
    for name, error in plain.items():
        assert 1e-4 < got[name] <= 2 * error, name


def distances(got: Grads, truth: Grads) -> dict[str, float]:
    return {name: float((got[name].double() - g).norm() / g.norm()) for name, g in truth.items()}


# --- what forward does to its own weights ---


def test_a_hook_on_a_weight_within_forward_is_refused() -> None:
    class Hooked(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            if self.mix.weight.requires_grad:
                self.mix.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
            return super().forward(tokens, h)

    model = built(Hooked)
    for call in (sg.backward, lambda *args, **options: sg.loss(*args, **options).backward()):
        message = r"a hook was registered on parameter mix\.weight within forward.*Register it outside, once"
        assert refused(message, partial(call, model, TOKENS, chunk=CHUNK))
        assert not grads(model)
        assert not model.mix.weight._backward_hooks


def test_requires_grad_toggled_within_forward() -> None:
    """A layer that is a constant in one of its uses, as a target network is."""

    class Toggled(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            self.mix.requires_grad_(False)
            x = self.mix(self.embed(tokens))
            self.mix.requires_grad_(True)
            y, h = self.roll(x, h)
            return self.head(y), h

    model = built(Toggled)
    both_ways(None, model, plain_grads(model))
    assert all(p.requires_grad for p in model.parameters())


@compiles
@pytest.mark.parametrize("call", [sg.loss, sg.evaluate, sg.backward], ids=lambda call: call.__name__)
def test_a_tangent_is_refused(call: Callable[..., Any]) -> None:
    """Forward-mode differentiation: chunks would drop it."""
    model = Net().double()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(model.initial_state(2), torch.ones(2, 8, dtype=torch.float64))
        with pytest.raises(sg.InputError, match="has a tangent"):
            call(model, TOKENS, chunk=CHUNK, state=dual)
