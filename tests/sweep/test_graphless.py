"""A pass without a graph has the bits of one with a graph, keeps nothing, and never gives a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from slimgrad.errors import SweepError
from slimgrad.sweep.graphless import GraphWanted, graphless, wants_graph

X = torch.linspace(-2, 2, 12).reshape(3, 4).requires_grad_()


def loss(x: Tensor) -> Tensor:
    return x.tanh().square().sum()


def within(compute: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught, graphless():  # noqa: PT011
        compute()
    return caught.value


def test_what_operations_save_is_not_kept() -> None:
    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.exp()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * ctx.saved_tensors[0]

    def alive(x: Tensor) -> list[bool]:
        first = x * x
        second = Saves.apply(first)
        third = second.sigmoid()
        refs = [StorageWeakRef(tensor.untyped_storage()) for tensor in (first, second, third)]
        out = third.sum()
        del first, second, third
        assert out.requires_grad
        return [not ref.expired() for ref in refs]

    assert alive(X) == [False, True, True]  # no backward pass reads the product; the others' read their results
    with graphless():
        assert alive(X) == [False, False, False]
    assert alive(X) == [False, True, True]


@pytest.mark.parametrize(
    "compute",
    [
        lambda: torch.autograd.grad(loss(X), X),
        lambda: torch.autograd.grad(loss(X), X, create_graph=True),
        lambda: loss(X).backward(),
        lambda: loss(X.detach().requires_grad_()).backward(),  # as a step does that descends on a loss of its own
        lambda: torch.autograd.functional.vjp(torch.tanh, X, torch.ones_like(X)),
        lambda: torch.autograd.functional.jvp(torch.tanh, X, torch.ones_like(X)),  # two backward passes
        lambda: torch.func.grad(loss)(X),
        lambda: torch.func.vjp(torch.tanh, X),
        lambda: torch.func.jacrev(torch.tanh)(X),
        lambda: torch.func.jacrev(torch.func.jacrev(loss))(X),
        lambda: torch.func.vmap(torch.func.grad(loss))(X),
        lambda: checkpoint(loss, X, use_reentrant=False).backward(),
        lambda: checkpoint(loss, X, use_reentrant=True).backward(),
        lambda: torch.compile(torch.func.grad(loss), backend="eager")(X),
        lambda: torch.compile(lambda x: torch.autograd.grad(loss(x), x), backend="eager")(X),
    ],
)
def test_a_gradient_asked_for_within_is_known(compute: Callable[[], Any]) -> None:
    torch.compiler.reset()
    assert wants_graph(within(compute))
    assert X.grad is None
    # and nothing is left behind: the same computes without, and so does what needs hooks of its own
    compute()
    X.grad = None
    checkpoint(loss, X, use_reentrant=False).backward()
    expected = torch.autograd.grad(loss(X), X)[0]
    assert X.grad is not None
    assert torch.equal(X.grad, expected)
    X.grad = None


def test_a_gradient_asked_for_later_is_refused_by_name() -> None:
    with graphless():
        y = loss(X)
    with pytest.raises(SweepError, match="reached into a chunk of a sweep from outside"):
        y.backward()


def test_a_gradient_that_reads_nothing_is_right() -> None:
    before = loss(X)
    with graphless():
        assert torch.equal(torch.autograd.grad((3 * X).sum(), X)[0], torch.full_like(X, 3.0))
        inside = torch.autograd.grad(before, X)[0]
    assert torch.equal(inside, torch.autograd.grad(loss(X), X)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize(
    "compute",
    [
        lambda: torch.func.vmap(torch.tanh)(X),
        lambda: torch.func.jvp(torch.tanh, (X,), (torch.ones_like(X),))[1],
        lambda: checkpoint(torch.tanh, X, use_reentrant=False),
        lambda: checkpoint(torch.tanh, X, use_reentrant=True),
        lambda: checkpoint(lambda x: checkpoint(torch.tanh, x, use_reentrant=False), X, use_reentrant=True),
    ],
)
def test_what_needs_no_graph_runs(compute: Callable[[], Tensor]) -> None:
    with graphless():
        y = compute()
    assert y.requires_grad
    assert torch.equal(y, compute())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoints_input_is_not_kept(reentrant: bool) -> None:
    def kept() -> bool:
        x = X * 2
        ref = StorageWeakRef(x.untyped_storage())
        y = checkpoint(torch.tanh, x, use_reentrant=reentrant)
        del x
        return y.requires_grad and not ref.expired()

    assert kept()
    with graphless():
        assert not kept()


def test_wants_graph_looks_along_the_chain_of_errors() -> None:
    def raised(how: Callable[[BaseException], None]) -> BaseException:
        try:
            try:
                raise GraphWanted
            except GraphWanted as error:
                how(error)
        except Exception as outer:  # noqa: BLE001
            return outer
        raise AssertionError

    def chained(error: BaseException) -> None:
        raise KeyError from error

    def handling(error: BaseException) -> None:
        raise KeyError

    def twice(error: BaseException) -> None:
        try:
            raise KeyError from error
        except KeyError as second:
            raise ValueError from second

    assert wants_graph(raised(chained))
    assert wants_graph(raised(handling))
    assert wants_graph(raised(twice))
    looped = KeyError()
    looped.__cause__ = ValueError()
    looped.__cause__.__cause__ = looped
    assert not wants_graph(looped)
    with pytest.raises(RuntimeError) as shapes:
        _ = X @ X
    assert not wants_graph(shapes.value)


def test_entered_where_hooks_are_not_allowed() -> None:
    def inner(x: Tensor) -> Tensor:
        with graphless():
            return loss(x)

    with pytest.raises(RuntimeError) as caught:
        torch.func.grad(inner)(X)
    assert wants_graph(caught.value)


def test_gradients_are_on_within_and_as_they_were_after() -> None:
    with torch.no_grad():
        with graphless():
            assert torch.is_grad_enabled()
            with torch.no_grad():
                assert not (X * 2).requires_grad
        assert not torch.is_grad_enabled()


def test_a_models_own_hooks_act_in_place_of_these() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with graphless():
        h = X.clone()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = h.exp().sum()
        assert len(packed) == 1
        assert torch.equal(torch.autograd.grad(y, h)[0], h.exp())
        assert wants_graph(within(lambda: torch.autograd.grad(h.exp().sum(), h)))


def modules(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Any]]:
    attention = nn.MultiheadAttention(32, 4, batch_first=True, dtype=dtype)
    causal = torch.ones(37, 37, dtype=torch.bool).tril()
    return {
        "LSTM": nn.LSTM(32, 24, 2, batch_first=True, dtype=dtype),
        "LSTM, eval": nn.LSTM(32, 24, batch_first=True, dtype=dtype).eval(),
        "GRU": nn.GRU(32, 24, 2, batch_first=True, dtype=dtype),
        "MultiheadAttention": lambda x: attention(x, x, x),
        "TransformerEncoderLayer, eval": nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dtype=dtype).eval(),
        "attention, causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        "attention, mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=causal),
        "Conv1d": nn.Conv1d(37, 16, 3, dtype=dtype),
        "Linear, LayerNorm, GELU": nn.Sequential(
            nn.Linear(32, 64, dtype=dtype), nn.LayerNorm(64, dtype=dtype), nn.GELU()
        ),
    }


def leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [leaf for part in output for leaf in leaves(part)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_those_of_a_pass_with_a_graph(dtype: torch.dtype) -> None:
    x = torch.randn(3, 37, 32, dtype=dtype, requires_grad=True)
    others = 0  # under no_grad: if none differed there, this test could not fail
    for name, module in modules(dtype).items():
        plain = leaves(module(x))
        with graphless():
            here = leaves(module(x))
        assert all(map(torch.equal, plain, here)), name
        assert all(leaf.requires_grad for leaf in here), name
        with torch.no_grad():
            others += not all(map(torch.equal, plain, leaves(module(x))))
    assert others > 0


def test_compiled_code_is_compiled_once_for_both() -> None:
    torch.compiler.reset()
    linear = nn.Linear(4, 4)
    compiled = torch.compile(lambda x: linear(x).tanh().softmax(-1), backend="aot_eager")
    with graphless():
        first = compiled(X)
        with torch.compiler.set_stance("fail_on_recompile"):
            second = compiled(X)
    with torch.compiler.set_stance("fail_on_recompile"):
        plain = compiled(X)
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)
    assert torch.autograd.grad(plain.square().sum(), X)[0].abs().sum() > 0
    with pytest.raises(SweepError, match="from outside"):
        torch.autograd.grad(first.sum(), X)
