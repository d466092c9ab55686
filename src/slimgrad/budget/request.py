"""What a call needs a plan for, and all that its costs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.call.arguments import Call, Options
from slimgrad.call.model import device_of
from slimgrad.call.source import Reader
from slimgrad.gradients.sink import Sink
from slimgrad.states import raw_tensor
from slimgrad.sweep import tree
from slimgrad.sweep.program import OnChunk
from slimgrad.sweep.schedules.base import Schedule


@dataclass(frozen=True)
class Request:
    """What a call needs a plan for.

    Args:
        model, inputs, targets, options, sink: as in `backward`.
        head: whether the first sweep runs chunks with their heads.
        differentiates: whether the sweep goes back.
        per_token: one loss per token.
        reserved: bytes that the process does not hold yet, and will, by what they are for (an optimiser's moments).
    """

    model: nn.Module
    inputs: Any
    targets: Any
    options: Options
    sink: Mapping[str, Sink] | None = None
    head: bool = False
    differentiates: bool = True
    per_token: bool = False
    reserved: Mapping[str, int] = field(default_factory=dict[str, int])

    def call(
        self,
        inputs: Any,
        targets: Any,
        chunk: int,
        schedule: Schedule | None,
        on_chunk: OnChunk | None,
        state: Any = None,
    ) -> Call:
        """A call like this one, over other inputs, whose sinks take nothing."""
        options = self.options._replace(chunk=chunk, schedule=schedule, on_chunk=on_chunk, state=state)
        sink = dict.fromkeys(self.sink or {}, _take_nothing)
        collect_in = "reverse" if self.differentiates and not self.head else "forward"
        return Call(
            self.model,
            inputs,
            targets,
            options,
            gathers=self.differentiates,
            sink=sink,
            collect_in=collect_in,
            per_token=self.per_token,
        )


def lengths_of(inputs: Any) -> tuple[int, ...]:
    """Tokens of each sequence, as far as can be told without a check."""
    if isinstance(inputs, list):
        return tuple(length for one in cast("list[Any]", inputs) for length in lengths_of(one))
    if isinstance(inputs, Reader):
        return (int(inputs.length),)
    shapes = [x.shape for x in tree.tensors(inputs)]
    return (max((shape[min(1, len(shape) - 1)] for shape in shapes if shape), default=0),)


def use_of(request: Request) -> Any:
    """All that the costs of a chunk depend on, but for lengths."""
    options, model = request.options, request.model
    modes = tuple(module.training for module in model.modules())
    parameters = tuple((p.requires_grad, p.dtype, p.device) for p in model.parameters())
    kinds = ("cpu", device_of(model).type)
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    given = tuple(_form(x) for x in (request.inputs, request.targets))
    whole = tuple(_form(x, whole=True) for x in (options.context, options.state))
    loss = getattr(options.loss_fn, "__code__", type(options.loss_fn))
    how = (
        request.head,
        request.differentiates,
        request.per_token,
        frozenset(request.sink or ()),
        torch.get_num_threads(),
    )
    return modes, parameters, autocast, given, whole, loss, how


def _form(given: Any, *, whole: bool = False) -> Any:
    """Of inputs and targets, everything but the time axis; with that, of context and state."""
    if isinstance(given, Reader):
        return type(given), given.batch
    leaves = [raw_tensor(leaf) for leaf in tree.leaves(given)]
    rest = 1 if whole else 2
    return frozenset((x.shape[:1], x.shape[rest:], x.dtype, x.requires_grad) for x in leaves if x is not None)


def _take_nothing(gradient: Tensor) -> None:
    pass


def tokens_between(given: Any, start: int, stop: int) -> Any:
    """A part of inputs or targets: leaves of their own, where they take gradients."""
    if hasattr(given, "read"):
        return _Part(given, start, stop)

    def cut(x: Tensor) -> Tensor:
        part = x[start:stop] if x.dim() == 1 else x[:, start:stop]
        return part.detach().requires_grad_() if x.requires_grad else part

    return tree.map_tensors(cut, given)


class _Part:
    """A part of what a reader gives."""

    def __init__(self, reader: Any, start: int, stop: int) -> None:
        self._reader, self._start, self.length, self.batch = reader, start, stop - start, reader.batch

    def read(self, start: int, stop: int) -> Any:
        return self._reader.read(self._start + start, self._start + stop)
