"""Carries a `Growing`: one buffer of rows, and one of their gradients."""

from __future__ import annotations

from array import array
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from slimgrad.errors import ModelError
from slimgrad.sweep.carriers.base import Carrier, Root, mismatch
from slimgrad.sweep.compiled import not_traced
from slimgrad.sweep.gather import refuse_escaped
from slimgrad.sweep.state import SPENT, Growing
from slimgrad.sweep.store import Store


class _Append(torch.autograd.Function):
    """All rows so far, as a view of the buffer; backward adds the old rows' gradient into the gradient buffer."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, anchor: Tensor, carrier: GrowingCarrier, start: int) -> Tensor:
        cast(Any, ctx).carrier, cast(Any, ctx).start, cast(Any, ctx).dtype = carrier, start, rows.dtype
        return carrier.prefix(start + rows.shape[1])

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (g,), start = grad_outputs, cast(int, cast(Any, ctx).start)
        carrier = cast(GrowingCarrier, cast(Any, ctx).carrier)
        if not carrier.in_backward:
            refuse_escaped(g)
        if start:
            carrier.add_gradient(g[:, :start])
        return g[:, start:].to(cast(Any, ctx).dtype), None, None, None


class GrowingCarrier(Carrier[int]):
    """Carries a `Growing` in one buffer, and its adjoint in another of the same size.

    Args:
        name: which leaf.
        initial: the rows so far.
        expected_growth: by what factor the rows of the first chunk will have multiplied at the end of the run; the
            buffer is allocated for that, and grows by half where the guess was short.
    """

    def __init__(self, index: int, name: str, initial: Growing, *, expected_growth: float) -> None:
        super().__init__(index, name)
        self._growth = expected_growth
        self._buffer = initial.value.detach().clone()
        self._gradient: Tensor | None = None
        self._length = initial.length
        self._written = initial.length  # rows that stand in the buffer, live or rolled back
        self._starts = array("q")  # the length before each chunk: 8 bytes a chunk
        self._bound: Growing | None = None
        self._following: Growing | None = None
        self._rows: Tensor | None = None
        self._edge: GradientEdge | None = None
        self._anchor: Tensor | None = None

    @property
    def length(self) -> int:
        """Rows before the chunk in hand."""
        return self._starts[self.chunk]

    def prefix(self, length: int) -> Tensor:
        """The first rows of the buffer as a tensor of its own, so that autograd sees neither a view nor a write."""
        view = self._buffer[:, :length]
        return torch.empty(0, dtype=view.dtype, device=view.device).set_(
            view.untyped_storage(), view.storage_offset(), view.shape, view.stride()
        )

    def add_gradient(self, g: Tensor) -> None:
        """Add to the adjoint of the first rows."""
        if self._gradient is None:
            wide = torch.promote_types(self._buffer.dtype, torch.float32)
            shape = (self._buffer.shape[0], self._written, *self._buffer.shape[2:])
            self._gradient = torch.zeros(shape, dtype=wide, device=g.device)
        self._gradient[:, : g.shape[1]] += g

    def _bind(self) -> Growing:
        self._following = self._rows = self._edge = None
        if self.chunk == len(self._starts):
            self._starts.append(self._length)
        self._length = self._starts[self.chunk]
        self._bound = Growing(self._buffer[:, :0], _link=self)
        return self._bound

    @not_traced
    def append(self, rows: Tensor) -> tuple[Tensor, Growing]:
        """What `Growing.append` does within a sweep."""
        if self._rows is not None and not self.in_backward:
            return SPENT.append(rows)
        if self._bound is None:
            raise ModelError(f"state {self.name}: append was called on a state of a sweep that is over")
        start, rows = self.length, rows.to(self._buffer.dtype)
        stop = start + rows.shape[1]
        if not self.in_backward:
            self._length = stop
            self._write(rows.detach(), start, stop)
        differentiable = rows.is_floating_point() or rows.is_complex()
        if differentiable:
            self.require_grad_mode("append")
        if not (torch.is_grad_enabled() and differentiable):
            rows, all_rows = rows.detach(), self.prefix(stop)
        else:
            if self._anchor is None:
                self._anchor = torch.zeros((), device=rows.device).requires_grad_()
            all_rows = cast(Tensor, _Append.apply(rows, self._anchor, self, start))
        following = Growing(all_rows, _link=SPENT)
        if not self.in_backward:
            # the edge as it is now: the model may go on to write to these rows in place
            self._edge = get_gradient_edge(rows) if rows.requires_grad else None
            self._rows, self._following = rows.detach(), following
        return all_rows, following

    def _write(self, rows: Tensor, start: int, stop: int) -> None:
        if stop <= self._written:  # written by the first sweep: these must be the same bits
            if not torch.equal(_bits(rows), _bits(self._buffer[:, start:stop])):
                raise mismatch(self.name, self.chunk)
            return
        if stop > self._buffer.shape[1]:
            guess = int(self._growth * (stop - start)) + start if start == self._starts[0] else 0
            # whole 64 bytes from sequence to sequence of the batch, however often the buffer grows: see `store`
            capacity = -(-max(stop, guess, self._buffer.shape[1] * 3 // 2) // 64) * 64
            wider = rows.new_empty((rows.shape[0], capacity, *rows.shape[2:]))
            wider[:, :start] = self._buffer[:, :start]
            self._buffer = wider
        self._buffer[:, start:stop] = rows
        self._written = stop

    def take(self, returned: Any) -> None:
        if returned is not (self._bound if self._following is None else self._following):
            raise self.wrong(returned)
        known = self.chunk + 1 < len(self._starts)
        if known and self._length != self._starts[self.chunk + 1]:
            raise mismatch(self.name, self.chunk)

    def roots(self) -> list[Root]:
        if self._rows is None or self._gradient is None or self._edge is None:
            return []
        start = self.length
        return [Root(self._edge, self._gradient[:, start : start + self._rows.shape[1]].to(self._rows.dtype))]

    def sources(self) -> list[Tensor]:
        return [] if self._anchor is None else [self._anchor]

    def settle(self) -> None:
        if self.reverses:
            self._length = self.length
        self._bound = self._following = self._rows = self._edge = self._anchor = None

    def keep(self, store: Store, *, rolls_back: bool) -> int | None:
        return None if rolls_back else self._length

    def load(self, store: Store, token: int) -> None:
        self._length = token

    def final(self) -> Growing:
        return Growing(self.prefix(self._length))

    def adjoint(self) -> Tensor | None:
        return None if self._gradient is None else self._gradient[:, : self._length].to(self._buffer.dtype)

    def set_adjoint(self, gradient: Tensor) -> None:
        self.add_gradient(gradient)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + (0 if self._gradient is None else self._gradient.nbytes)


def _bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself and -0 differs from 0."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
