"""Where parameter gradients gather over the chunks, and how they are delivered once.

Chunks run on aliases: tensors that share the parameters' storage and have a `.grad` of their own. So a parameter's
hooks (clipping, data parallelism) see nothing until the end, when its whole gradient goes through the real leaf in one
piece; an interrupt before that leaves every `.grad` as it was; tied weights have one alias.

Gradients are added where they stand: one buffer per parameter, float32 for 16-bit parameters (adding in bfloat16 is off
by 0.33 after 4,096 chunks). A chunk's gradient of one parameter at a time exists beside them; for the weights of linear
layers and embeddings not even that, because their products are added straight into the buffer (`addmm_`, `index_add_`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from slimgrad.sweep.interrupt import uninterrupted

Accumulate = Callable[[str, Tensor], None]
_Place = tuple[dict[str, Any], str, Tensor]  # a module's own parameters, the name, the parameter
_Places = tuple[nn.Module, Sequence[_Place], Sequence[nn.RNNBase]]


class _Alias(Tensor):
    """A parameter's stand-in within a sweep: routes linear layers and embeddings to products added in place."""

    owner: Gather

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            if torch.is_grad_enabled():
                if func is F.linear and _adds_in_place(*_weight_and_input(*args, **kwargs)):
                    return _linear(*args, **kwargs)
                if func is F.embedding and _adds_in_place(args[1]) and _is_plain_lookup(kwargs):
                    return _Embedding.apply(*args)
            return func(*args, **kwargs)


def _adds_in_place(weight: Any, activations: Any = None) -> bool:
    """Whether the weight's gradient may be added straight into its buffer."""
    return (
        isinstance(weight, _Alias)
        and weight.dim() == 2
        and weight.owner.adds_in_place(weight)
        and (activations is None or activations.dtype == weight.dtype)
        and not torch.is_autocast_enabled(weight.device.type)
    )


def _is_plain_lookup(options: Mapping[str, Any]) -> bool:
    """Whether an embedding, which hands all its options on by name, has none of them set."""
    return all(value is None or value is False for name, value in options.items() if name != "norm_type")


def _weight_and_input(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return weight, input


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return cast(Tensor, _Linear.apply(input, weight, bias))


class _Linear(torch.autograd.Function):
    """`F.linear` whose weight gradient is added into the gathering buffer by one matrix product."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        cast(Any, ctx).weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        context, (g,) = cast(Any, ctx), grad_outputs
        (x,) = cast("tuple[Tensor]", context.saved_tensors)
        weight = cast(_Alias, context.weight)
        rows, columns = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, _, needs_bias = cast("tuple[bool, bool, bool]", context.needs_input_grad)
        weight_gradient = None
        if weight.owner.paused:
            weight_gradient = rows.t() @ columns
        else:
            weight.owner.add_product(weight, rows.t(), columns)
        return g @ weight if needs_x else None, weight_gradient, rows.sum(0) if needs_bias else None


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose weight gradient is added row by row into the gathering buffer."""

    @staticmethod
    def forward(ctx: FunctionCtx, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        cast(Any, ctx).weight = weight
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[None, Tensor | None]:
        (g,), context = grad_outputs, cast(Any, ctx)
        (indices,) = cast("tuple[Tensor]", context.saved_tensors)
        weight = cast(_Alias, context.weight)
        indices, rows = indices.reshape(-1), g.reshape(-1, g.shape[-1])
        if weight.owner.paused:
            return None, rows.new_zeros(weight.shape).index_add(0, indices, rows)
        weight.owner.add_rows(weight, indices, rows)
        return None, None


class Gather:
    """The gradients of one call, parameter by parameter.

    Args:
        parameters: the trainable parameters by name, each once.
        accumulate: instead of buffers, `accumulate(name, gradient)` gets each chunk's gradient of each parameter;
            whatever is linear in the gradient (a projection, a selection of columns) stays exact. Nothing is then
            delivered. The tensor is the caller's to keep.
    """

    def __init__(self, parameters: Mapping[str, Tensor], accumulate: Accumulate | None = None) -> None:
        self._parameters = dict(parameters)
        self._accumulate = accumulate
        self.paused = True  # while the model runs: a gradient that it takes itself, on the way, is not to be added
        self._wide: dict[str, Tensor] = {}
        self._places: _Places | None = None
        self._aliases: dict[int, Tensor] = {}
        for name, parameter in self._parameters.items():
            alias = parameter.detach().as_subclass(_Alias)
            alias.requires_grad_()
            alias.owner = weakref.proxy(self)  # no cycle: buffers go when the call is over
            if accumulate is not None or alias.dtype in (torch.bfloat16, torch.float16):
                alias.register_post_accumulate_grad_hook(self._hook(name))
            self._aliases[id(parameter)] = alias

    @property
    def aliases(self) -> list[Tensor]:
        """The stand-ins, in the order of the parameters."""
        return list(self._aliases.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        gradients = [alias.grad for alias in self._aliases.values()]
        return sum(g.nbytes for g in gradients if g is not None) + sum(g.nbytes for g in self._wide.values())

    def adds_in_place(self, alias: Tensor) -> bool:
        """Whether products may be added straight into this parameter's buffer."""
        return self._accumulate is None and alias.dtype in (torch.float32, torch.float64)

    def add_product(self, alias: Tensor, left: Tensor, right: Tensor) -> None:
        """Add `left @ right` to the gradient of `alias`."""
        if alias.grad is None:
            alias.grad = left @ right
        else:
            alias.grad.addmm_(left, right)

    def add_rows(self, alias: Tensor, indices: Tensor, rows: Tensor) -> None:
        """Add `rows` to the rows `indices` of the gradient of `alias`."""
        if alias.grad is None:
            alias.grad = torch.zeros_like(alias, requires_grad=False).as_subclass(Tensor)
        alias.grad.index_add_(0, indices, rows)

    def gradients(self) -> dict[str, Tensor | None]:
        """What has gathered so far, by parameter name, in the parameter's own dtype; None where nothing came."""
        return {
            name: self._wide[name].to(parameter.dtype) if name in self._wide else self._aliases[id(parameter)].grad
            for name, parameter in self._parameters.items()
        }

    def deliver(self, extra: Sequence[tuple[Tensor, Tensor]] = (), *, parameters: bool = True) -> None:
        """Send each gathered gradient through its real leaf, once: `.grad` grows and the leaf's hooks run.

        A keyboard interrupt waits until all are delivered, so that `.grad` holds either nothing of this call or all.

        Args:
            extra: further (tensor, gradient) pairs, delivered likewise: inputs, context.
            parameters: whether the parameters' own are delivered (not with `accumulate`).
        """
        with uninterrupted(second_passes=False):
            for name, parameter in self._parameters.items() if parameters else ():
                alias = self._aliases[id(parameter)]
                gradient, alias.grad = alias.grad, None
                if name in self._wide:
                    gradient = self._wide.pop(name).to(parameter.dtype)
                if gradient is not None:
                    torch.autograd.backward([parameter], [gradient])
            if extra:  # together: they may share a graph, which can be gone through only once
                torch.autograd.backward([tensor for tensor, _ in extra], [gradient for _, gradient in extra])

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Generator[None]:
        """Within the block, `module` and all below it use the aliases in place of their parameters.

        Products are added in place only once `paused` is set to False, when the chunk's own backward pass begins.
        """
        self.paused = True
        places, recurrent = self._find_places(module)
        try:
            for own, name, parameter in places:
                own[name] = self._aliases[id(parameter)]
            for rnn in recurrent:
                _refresh_flat_weights(rnn)
            yield
        finally:
            for own, name, parameter in places:
                own[name] = parameter
            for rnn in recurrent:
                _refresh_flat_weights(rnn)

    def _find_places(self, module: nn.Module) -> tuple[Sequence[_Place], Sequence[nn.RNNBase]]:
        """Where `module` holds the parameters: looked up once, entered once per chunk."""
        found = self._places
        if found is None or found[0] is not module:
            places: list[_Place] = [
                (cast("dict[str, Any]", submodule._parameters), name, parameter)  # pyright: ignore[reportPrivateUsage]
                for submodule in module.modules()
                for name, parameter in submodule._parameters.items()  # pyright: ignore[reportPrivateUsage]
                if parameter is not None and id(parameter) in self._aliases
            ]
            found = self._places = (module, places, [m for m in module.modules() if isinstance(m, nn.RNNBase)])
        return found[1:]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def take(alias: Tensor) -> None:
            gradient, alias.grad = alias.grad, None
            assert gradient is not None
            if self._accumulate is not None:
                self._accumulate(name, gradient)
            elif name in self._wide:
                self._wide[name] += gradient
            else:
                self._wide[name] = gradient.float()

        return take


def _refresh_flat_weights(rnn: nn.RNNBase) -> None:
    """torch's recurrent layers hold a second list of their parameters, which must follow the swap."""
    module = cast(Any, rnn)
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
