"""The fast path of gathering: products of plain linear layers and embeddings, added straight into the buffer.

Ordinary autograd makes a weight's gradient first and adds it afterwards: one more weight in memory and one more pass
over it, per chunk. A `Fused` takes the place of `forward` on such a layer while a chunk runs, so that its gradient is
one `addmm_` (or `index_add_`) into the buffer. Without it a gradient of three layers of width 1,024 takes 9 % longer.

It looks at each call whether that is safe, and else calls the layer's own forward, whose gradient takes the ordinary
way into the same stand-in: see `is_fusable` and `_is_ordinary`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

if TYPE_CHECKING:
    from slimgrad.gradients.buffers import Gather

_unsafe_view = torch.ops.aten._unsafe_view.default  # looked up once: there are a dozen calls a chunk


class _Linear(torch.autograd.Function):
    """`F.linear` whose weight gradient is added into the gathering buffer by one matrix product."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, gather: Gather) -> Tensor:
        ctx.save_for_backward(x)
        cast(Any, ctx).weight, cast(Any, ctx).gather = weight, gather
        y = F.linear(x, weight, bias)
        # with a bias it is a view, and what an own function returns as a view may not be written to in place
        return _unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        context, (g,) = cast(Any, ctx), grad_outputs
        (x,) = cast("tuple[Tensor]", context.saved_tensors)
        weight, gather = cast(Tensor, context.weight), cast("Gather", context.gather)
        rows, columns = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, needs_bias, _ = cast("tuple[bool, bool, bool, bool]", context.needs_input_grad)
        weight_gradient = None
        if needs_weight and gather.is_own_backward():
            gather.add_product(weight, rows.t(), columns)
        elif needs_weight:
            weight_gradient = rows.t() @ columns
        return g @ weight if needs_x else None, weight_gradient, rows.sum(0) if needs_bias else None, None


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose weight gradient is added row by row into the gathering buffer."""

    @staticmethod
    def forward(ctx: FunctionCtx, indices: Tensor, weight: Tensor, gather: Gather) -> Tensor:
        ctx.save_for_backward(indices)
        cast(Any, ctx).weight, cast(Any, ctx).gather = weight, gather
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[None, Tensor | None, None]:
        (g,), context = grad_outputs, cast(Any, ctx)
        (indices,) = cast("tuple[Tensor]", context.saved_tensors)
        weight, gather = cast(Tensor, context.weight), cast("Gather", context.gather)
        indices, rows = indices.reshape(-1), g.reshape(-1, g.shape[-1])
        if not context.needs_input_grad[1]:
            return None, None, None
        if gather.is_own_backward():
            gather.add_rows(weight, indices, rows)
            return None, None, None
        return None, add_rows(rows.new_zeros(weight.shape), indices, rows), None


def add_rows(total: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """`total[indices] += rows` in place, in an order that is the same each time."""
    if total.device.type == "cpu":
        return total.index_add_(0, indices, rows)
    return total.index_put_((indices,), rows, accumulate=True)  # sorted there; index_add_ adds as threads come


class Fused:
    """Takes the place of the `forward` of a plain linear layer or embedding while a chunk runs.

    One object a layer, for good, so that what torch.compile knows of the layer stays valid from call to call.

    Args:
        layer: see `is_fusable`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)
        self._parameters = cast("dict[str, Any]", layer._parameters)  # pyright: ignore[reportPrivateUsage]
        self._is_linear = isinstance(layer, nn.Linear)
        self._gather: Gather | None = None
        self._stand_in: Tensor | None = None

    def tie(self, gather: Gather | None, stand_in: Tensor | None) -> None:
        """Whose buffers the products are added to, and the stand-in of the weight."""
        self._gather, self._stand_in = gather, stand_in

    def __call__(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # first: what is looked at here becomes a condition of the compiled code
            return self._plain(input)
        gather, weight, own = self._gather, self._stand_in, self._parameters
        # functional_call puts another weight there, whose gradient somebody else wants
        if gather is None or weight is None or own.get("weight") is not weight or not _is_ordinary(weight):
            return self._plain(input)
        if input.is_nested or not gather.is_on_its_stream(weight.device):
            return self._plain(input)
        if not self._is_linear:
            return cast(Tensor, _Embedding.apply(input, weight, gather))
        if input.dtype != weight.dtype or "bias" not in own:  # a bias made by a hook, or a buffer
            return self._plain(input)
        return cast(Tensor, _Linear.apply(input, weight, own["bias"], gather))

    def __deepcopy__(self, memo: dict[int, Any]) -> Fused:
        """A copy of the layer made while a chunk runs is a plain layer."""
        return Fused(memo.get(id(self._layer()), self._layer()))

    def _plain(self, input: Tensor) -> Tensor:
        layer: Any = self._layer()
        return type(layer).forward(layer, input)


_forwards: weakref.WeakKeyDictionary[nn.Module, Fused] = weakref.WeakKeyDictionary()


def fused_forward(layer: nn.Module) -> Fused:
    """The layer's `Fused`."""
    found = _forwards.get(layer)
    if found is None:
        found = _forwards[layer] = Fused(layer)
    return found


def _is_ordinary(weight: Tensor) -> bool:
    """Whether plain autograd is at work, without a transform, a mode or autocast."""
    return (
        torch.is_grad_enabled()
        and torch._C._len_torch_function_stack() == 0  # pyright: ignore[reportPrivateUsage]
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore
        and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and not torch.is_autocast_enabled(weight.device.type)
    )


def is_fusable(layer: nn.Module) -> bool:
    """Whether the layer is one of torch's own linear layers or embeddings, just as torch makes it."""
    weight = layer._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    if "forward" in layer.__dict__ or weight is None or weight.dim() != 2 or not weight.numel():
        return False
    if type(layer) is nn.Embedding:
        return layer.padding_idx is layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse)
    return type(layer) is nn.Linear


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs this module (and so all below it)."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None  # pyright: ignore


def outside_compiled(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, without those that torch.compile runs."""
    if not is_compiled(module):
        yield module
        for child in module.children():
            yield from outside_compiled(child)
