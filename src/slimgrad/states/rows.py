"""Rows that pile up along time: forward they are appended, back they are cut off."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from slimgrad.errors import ConsumedError, ModelError
from slimgrad.gradients.escaped import refuse_escaped
from slimgrad.states.base import Carrier, Purpose, Root, Setting, State, mismatch, refuse_half_a_number
from slimgrad.states.checksum import checksum
from slimgrad.states.tensors import version
from slimgrad.sweep.compiled import not_traced
from slimgrad.sweep.record import Record
from slimgrad.sweep.series import Series
from slimgrad.sweep.store import Store, alignment_bytes


class Growing(State):
    """Rows that pile up along time: the keys or the values of a cache.

    `rows, following = state.append(new_rows)` gives all rows so far, the new ones last, and the state after the chunk.
    Memory in a sweep: one buffer and one gradient buffer, linear in the sequence. That is what full attention needs.

    Args:
        value: the rows so far, `[batch, time, ...]`; usually `time` = 0.

    Raises:
        ModelError: a value with fewer than two axes.
    """

    __slots__ = ()

    def __init__(self, value: Tensor, *, _link: Any = None) -> None:
        if value.dim() < 2:
            raise ModelError(f"Growing expects [batch, time, ...], got shape {tuple(value.shape)}")
        super().__init__(value, _link=_link)

    def append(self, rows: Tensor, *, last: int | None = None) -> tuple[Tensor, Growing]:
        """Append one chunk's rows.

        Args:
            rows: `[batch, new, ...]`, the other axes as in the rows so far.
            last: how many of the last rows are wanted (a window), at least the new ones; None: all.

        Returns:
            The rows, `[batch, so far + new, ...]` or the last of them, and the state that follows. Gradients flow
            through both. Within a sweep the rows are its own memory: they may not be written to.

        Raises:
            ModelError: rows of another shape, or complex ones to a real state; `last` below the number of new rows;
                within a sweep, the second call in a chunk.

        Cost: within a sweep a copy of the new rows, and where rows do not lie on the device one of all that are wanted;
        outside of a sweep a copy of all.
        """
        expected, got = self._value.shape, rows.shape
        if expected[:1] + expected[2:] != got[:1] + got[2:]:
            raise ModelError(
                f"Growing.append expects rows [batch, new, ...] that match {list(expected)} except along axis 1, "
                f"got {list(got)}"
            )
        refuse_half_a_number("Growing.append", rows, self._value.dtype)
        if last is not None and last < rows.shape[1]:
            raise ModelError(f"Growing.append: last={last}: expected at least the {rows.shape[1]} new rows")
        if self._link is not None:
            return self._link.append(rows, last)
        value = torch.cat([self._value, rows.to(self._value.dtype)], dim=1)
        return value if last is None else value[:, -last:], Growing(value)

    @property
    def length(self) -> int:
        """Rows so far, known at any time: the position of the next one."""
        return self._value.shape[1] if self._link is None else self._link.length

    def carrier(self, setting: Setting) -> RowsCarrier:
        return RowsCarrier(setting, self)

    def kept_bytes(self) -> int:
        return 0  # its rows stay in the one buffer: a copy is a length

    def __repr__(self) -> str:
        return f"Growing(length={self.length}, row_shape={tuple(self._value.shape[2:])}, dtype={self.dtype})"


class _Following:
    """Stands behind the state after a chunk."""

    def __init__(self, length: int) -> None:
        self.length = length

    def append(self, rows: Tensor, last: int | None = None) -> Any:
        raise ModelError(
            f"append was called twice on one Growing within a chunk (second rows: {tuple(rows.shape)}); "
            "expected one call per chunk. Concatenate the rows first, or hold two Growing states"
        )

    def value_of(self, state: Growing) -> Tensor:
        value = state._value  # pyright: ignore[reportPrivateUsage]
        if value.shape[1] < self.length:
            raise ModelError(
                f"the value of a Growing was read after append(..., last={value.shape[1]}), which gave its last rows "
                "alone; expected the rows to be taken from append"
            )
        return value


class _Append(torch.autograd.Function):
    """The wanted rows, as a view of the buffer; backward adds the old rows' gradient to the gradient buffer."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, anchor: Tensor, carrier: RowsCarrier, first: int, start: int) -> Tensor:
        cast(Any, ctx).carrier, cast(Any, ctx).dtype = carrier, rows.dtype
        cast(Any, ctx).first, cast(Any, ctx).old = first, start - first
        return carrier.rows(first, start + rows.shape[1])

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (g,), old = grad_outputs, cast(int, cast(Any, ctx).old)
        carrier = cast(RowsCarrier, cast(Any, ctx).carrier)
        if not carrier.in_backward:
            refuse_escaped(g)
        if old:
            carrier.add_gradient(g[:, :old], cast(Any, ctx).first)
        return g[:, old:].to(cast(Any, ctx).dtype), None, None, None, None


class RowsCarrier(Carrier):
    """Carries a `Growing` in one buffer, and its adjoint in another of the same size.

    The buffers lie where the schedule says. Of one that is not in the device's memory the rows that a chunk asks for
    are copied to it.
    """

    of_chunk = ("length", "_bound", "_following", "_rows", "_bits", "_edge", "_anchor")

    def __init__(self, setting: Setting, initial: Growing) -> None:
        super().__init__(setting)
        self._rolls_back, self._growth, self._store = setting.rolls_back, setting.growth, setting.rows
        self._shape, self._dtype, self._device = initial.shape, initial.dtype, initial.device
        self._buffer = setting.rows.series(initial.shape, initial.dtype, initial.device)
        self._buffer.write(0, initial.value.detach())
        self._gradient: Series | None = None
        self._reach: int | None = 0  # rows before it that the last chunk asked for; None: all
        self.length = initial.length  # rows before the chunk
        self._length = initial.length  # live
        self._written = initial.length  # rows that stand in the buffer, live or rolled back
        self._saved = 0  # of them, rows that were given to be saved
        self._steady = True  # whether these stand there as they were given
        self._graded = 0  # rows whose gradient is still to be used
        self._lengths = Record()  # before each chunk
        self._bound: Growing | None = None
        self._following: Growing | None = None
        self._rows: Tensor | None = None
        self._bits: Tensor | int = 0
        self._edge: GradientEdge | None = None
        self._anchor: Tensor | None = None
        self._version = 0  # of the rows that the chunk was given

    @property
    def rolls_back(self) -> bool:
        return True

    def rows(self, first: int, stop: int) -> Tensor:
        """Some rows of the buffer as a tensor of its own, so that autograd sees neither a view nor a write."""
        return self._buffer.lend(first, stop, self._device)

    def _refuse_spoilt(self) -> None:
        """Raise if somebody wrote to rows that were handed out, when no chunk ran."""
        if self._buffer.is_spoilt:
            raise ConsumedError(
                f"state {self.name}: rows of a Growing were written to in place between two chunks, or between the "
                "sweeps; expected the state that was handed out to be left alone until the gradient is there, for its "
                "rows are those of the sweep. Clone them first: state.value.clone()"
            )

    def add_gradient(self, g: Tensor, first: int = 0) -> None:
        """Add to the adjoint of the rows from `first` on."""
        self.is_intact = False
        if self._gradient is None:
            self._gradient = self._new_gradient(self._written)
        self._gradient.add(first, g)

    def _new_gradient(self, length: int) -> Series:
        self._graded = length
        wide = torch.promote_types(self._dtype, torch.float32)
        return self._store.series((self._shape[0], length, *self._shape[2:]), wide, self._device, zeros=True)

    def _bind(self) -> Growing:
        self._refuse_spoilt()
        self._lengths.put(self.span.start, self._length)
        known = self._lengths.at(self.span.start)
        self.length = self._length = self._length if known is None else known  # within a finer chunk there is none
        self._bound = Growing(self._buffer.read(0, 0, self._device), _link=self)
        first = 0 if self._reach is None else max(self.length - self._reach, 0)
        self._buffer.fetch(first, self.length)
        if self._gradient is not None:
            self._gradient.fetch(first, self._lengths.at(self.span.stop) or self.length)
        return self._bound

    @not_traced
    def append(self, rows: Tensor, last: int | None = None) -> tuple[Tensor, Growing]:
        """What `Growing.append` does within a sweep."""
        if self._bound is None:
            raise ModelError(f"state {self.name}: append was called on a state of a sweep that is over")
        if self._rows is not None and not self.in_backward:
            return _Following(0).append(rows)
        start, rows = self.length, rows.to(self._dtype)
        stop = start + rows.shape[1]
        first = 0 if last is None else max(stop - last, 0)
        self._reach = None if last is None else start - first
        if not self.in_backward:
            self._length = stop
            self._bits = checksum(rows)
            if self.finer or stop > self._written:  # else they stand there, and are compared by their checksum
                self._write(rows.detach(), start, stop)
        differentiable = rows.is_floating_point() or rows.is_complex()
        if differentiable:
            self.require_grad_mode("append")
        if not (torch.is_grad_enabled() and differentiable):
            rows, found = rows.detach(), self.rows(first, stop)
        else:
            if self._anchor is None:
                self._anchor = torch.zeros((), device=rows.device).requires_grad_()
            found = cast(Tensor, _Append.apply(rows, self._anchor, self, first, start))
        following = Growing(found, _link=_Following(stop))
        if not self.in_backward:
            # the edge as it is now: the model may go on to write to these rows in place
            self._edge = get_gradient_edge(rows) if rows.requires_grad else None
            self._rows, self._following, self._version = rows.detach(), following, version(found)
        return found, following

    def value_of(self, state: Growing) -> Tensor:
        raise ModelError(
            "the value of a Growing was read before append within a sweep, where it is not known yet; "
            "take it from `rows, following = state.append(new_rows)`"
        )

    def _write(self, rows: Tensor, start: int, stop: int) -> None:
        if stop > self._buffer.capacity:
            guess = int(self._growth * (stop - start)) + start if self._lengths.first == start else 0
            # from sequence to sequence of the batch whole multiples of it, however often the buffer grows: see `store`
            multiple = max(64, alignment_bytes(self._device) // rows.dtype.itemsize)
            capacity = -(-max(stop, guess, self._buffer.capacity * 3 // 2) // multiple) * multiple
            self._buffer.grow(capacity, start)
        self._buffer.write(start, rows)
        self._written = max(self._written, stop)
        self._steady = self._steady and start >= self._saved

    def take(self, returned: Any) -> None:
        if returned is not (self._bound if self._following is None else self._following):
            raise self.wrong(returned)
        # those of a copy have a version each; the lent ones share one, also with what earlier chunks were given
        if self._buffer.is_spoilt or (returned is self._following and version(returned._value) != self._version):
            raise ModelError(
                f"state {self.name}: rows of a Growing were written to in place in {self.span}, by the model or by "
                "loss_fn; expected the rows that append returned to be left alone, since the chunks after this one and "
                "the way back read them again. Use out-of-place operations, or clone the rows first: rows.clone()"
            )
        known = self._lengths.at(self.span.stop)
        if known is not None and known != self._length:
            raise mismatch(self.name, self.span)

    def checksum(self) -> Tensor | int:
        return self._bits

    def roots(self) -> list[Root]:
        if self._rows is None or self._gradient is None or self._edge is None:
            return []
        start = self.length
        g = self._gradient.read(start, start + self._rows.shape[1], self._device)
        return [Root(self._edge, g.to(self._rows.dtype))]

    def sources(self) -> list[Tensor]:
        return [] if self._anchor is None else [self._anchor]

    def _settle(self) -> None:
        if self.position == self.span.start:
            self._length = self.length
            self._graded = self.length if self.reverses else self._graded
        self._forget()

    def rewind(self) -> None:
        if self._bound is not None:
            self.position, self._length = self.span.start, self.length
            if self.purpose in (Purpose.FORWARD, Purpose.TAPE) and not self.from_tape:
                self._written = self._length
        self._forget()

    def _forget(self) -> None:
        self._bound = self._following = self._rows = self._edge = self._anchor = None
        self._bits = 0

    def keep(self, store: Store, *, whole: bool) -> int | None:
        return None if self._rolls_back and not whole else self._length

    def load(self, store: Store, token: int, position: int) -> None:
        self._length, self.position = token, position

    def final(self) -> Growing:
        return Growing(self.rows(0, self._length))

    def adjoint(self) -> Tensor | None:
        gradient = self._gradient
        return None if gradient is None else gradient.read(0, self._length, self._device).to(self._dtype)

    def set_adjoint(self, gradient: Tensor | None) -> None:
        self._gradient = None
        if gradient is not None:
            self.add_gradient(gradient)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + (0 if self._gradient is None else self._gradient.nbytes)

    def take_up(self, aside: dict[str, Any]) -> None:
        self._refuse_spoilt()
        super().take_up(aside)

    def state(self) -> dict[str, Any]:
        self._refuse_spoilt()
        gradient, self._saved = self._gradient, self._written
        return {
            "position": self.position,
            "length": self._length,
            "written": self._written,
            "rows": self._buffer.state(self._written, steady=self._steady),
            "adjoint": None if gradient is None else gradient.state(min(self._graded, gradient.capacity)),
            "lengths": self._lengths.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.position, self._length = state["position"], state["length"]
        self._lengths.load_state(state["lengths"])
        self._written = state["written"]
        self._buffer.load_state(state["rows"])
        self._saved, self._steady, self._gradient = self._written, state["rows"].steady, None
        if state["adjoint"] is not None:
            self._gradient = self._new_gradient(0)
            self._gradient.load_state(state["adjoint"])
            self._graded = state["adjoint"].length
