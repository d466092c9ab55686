"""Prefix sums: forward `S += delta`, back `S -= delta`, bit for bit."""

from __future__ import annotations

from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from slimgrad.errors import ModelError, NonFiniteError
from slimgrad.states.accumulator import Accumulator, Snapshot, kept_bytes
from slimgrad.states.base import Carrier, Purpose, Root, Setting, State, mismatch, refuse_half_a_number
from slimgrad.states.checksum import checksum
from slimgrad.states.tensors import version
from slimgrad.sweep.compiled import not_traced
from slimgrad.sweep.store import Handle, Store


class PrefixSum(State):
    """A running sum over time: the state of linear attention, and of anything that only ever adds.

    `before, following = state.advance(delta)` gives the sum before the chunk (a tensor) and the state after it, whether
    the model runs plainly, in a forward sweep or in a reverse sweep. Outside of a sweep it is an ordinary addition.

    Args:
        value: the sum so far, any shape, of floating, complex or integer numbers, usually zeros. Integer sums are exact
            counters (positions).

    Raises:
        ModelError: booleans, whose sum is an "or", which cannot be subtracted.

    Cost: in a sweep 10 bytes per element (float64: 16), and what `accumulator` says; integers their own.
    """

    __slots__ = ()

    def __init__(self, value: Tensor, *, _link: Any = None) -> None:
        if value.dtype == torch.bool:
            raise ModelError(
                'PrefixSum expects numbers, got torch.bool: a sum of booleans is an "or", which cannot be subtracted '
                "again. Sum integers (PrefixSum of torch.int64 zeros; booleans may be added to it) and ask for > 0"
            )
        super().__init__(value, _link=_link)

    def advance(self, delta: Tensor) -> tuple[Tensor, PrefixSum]:
        """Add one chunk's contribution.

        Args:
            delta: the chunk's own contribution, of the sum's shape (or one that broadcasts to it).

        Returns:
            The sum before the chunk, of its shape and dtype, and the state that follows. Gradients flow through both.
            Within a sweep the value of the latter waits for the device where it is read.

        Raises:
            ModelError: within a sweep, the second call in a chunk; or a complex contribution to a real sum.
            NonFiniteError: within a sweep, a NaN or an infinity.

        Cost: an addition; within a sweep about ten passes over the sum.
        """
        refuse_half_a_number("PrefixSum.advance", delta, self._value.dtype)
        if delta.shape != self._value.shape:
            delta = delta.expand(self._value.shape)
        if self._link is not None:
            return self._link.advance(delta)
        return self._value, PrefixSum(self._value + delta.to(self._value.dtype))

    def carrier(self, setting: Setting) -> SumCarrier:
        return SumCarrier(setting, self)

    def kept_bytes(self) -> int:
        return kept_bytes(self._value.shape, self._value.dtype)

    def __repr__(self) -> str:
        return f"PrefixSum(shape={tuple(self.shape)}, dtype={self.dtype})"


class _Advance(torch.autograd.Function):
    """The sum after a chunk: has the value `after`, and hands its cotangent to `before` and to `delta`.

    Float addition of `before` and `delta` would not give the accumulator's bits; the sum is linear, so its gradient
    needs no values at all.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, before: Tensor, delta: Tensor, after: Tensor) -> Tensor:
        cast(Any, ctx).delta_dtype = delta.dtype
        return after.view_as(after)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = grad_outputs
        return g, _of_delta(g, cast(torch.dtype, cast(Any, ctx).delta_dtype)), None


def _of_delta(g: Tensor, dtype: torch.dtype) -> Tensor:
    """From the cotangent of a sum to that of a contribution, which may be real where the sum is complex."""
    return (g.real if g.is_complex() and not dtype.is_complex else g).to(dtype)


class _Following:
    """Stands behind the state after a chunk. Its value is found when it is asked for."""

    def __init__(self, carrier: SumCarrier, delta: Tensor) -> None:
        self._carrier, self._delta, self._version = carrier, delta, version(delta)
        self._value: Tensor | None = None

    def advance(self, delta: Tensor) -> Any:
        raise ModelError(
            f"advance was called twice on one PrefixSum within a chunk (second delta: {tuple(delta.shape)}); "
            "expected one call per chunk. Add the contributions first, or hold two sums"
        )

    def value_of(self, state: PrefixSum) -> Tensor:
        if self._value is None:
            if version(self._delta) != self._version:
                raise ModelError(
                    "the value of a PrefixSum was read after the contribution to it was written to in place; expected "
                    "it left alone until then. Read the value first, or clone the contribution: advance(delta.clone())"
                )
            before, after = self._carrier.around(self._delta)
            grad = before.requires_grad and torch.is_grad_enabled()
            self._value = cast(Tensor, _Advance.apply(before, self._delta, after)) if grad else after
        return self._value


class _Kept(NamedTuple):
    """A kept copy: the steps in the store, and the quanta by reference. These are replaced when one of them widens,
    which is seldom, so that copies share them.
    """

    handle: Handle
    snapshot: Snapshot


class SumCarrier(Carrier):
    """Carries a `PrefixSum` in an exact accumulator."""

    of_chunk = ("_goes_back", "_bound", "_following", "_before", "_after", "_edge")

    def __init__(self, setting: Setting, initial: PrefixSum) -> None:
        super().__init__(setting)
        try:
            self.accumulator = Accumulator(initial.value)
        except NonFiniteError as error:
            raise NonFiniteError(f"initial state {self.name}: {error}") from None
        self._rolls_back = setting.rolls_back
        # shape, dtype and device, for the model to ask for while the value is not known
        self._like = initial.value.detach().new_empty(()).expand(initial.shape)
        self._goes_back = False
        self._bound: PrefixSum | None = None
        self._following: PrefixSum | None = None
        self._before: Tensor | None = None
        self._after: Tensor | None = None  # for a chunk on a tape, when the sum has moved on
        self._edge: tuple[GradientEdge, torch.dtype] | None = None
        self._kept_scales: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # alive while a copy needs them

    @property
    def rolls_back(self) -> bool:
        return True

    def _bind(self) -> PrefixSum:
        self._goes_back = self.position != self.span.start
        self._bound = PrefixSum(self._like, _link=self)
        return self._bound

    @not_traced
    def advance(self, delta: Tensor) -> tuple[Tensor, PrefixSum]:
        """What `PrefixSum.advance` does within a sweep."""
        if self._bound is None:
            raise ModelError(f"state {self.name}: advance was called on a state of a sweep that is over")
        if self._before is not None:
            following = _Following(self, delta)
            return (
                (self._before, PrefixSum(self._like, _link=following)) if self.in_backward else following.advance(delta)
            )
        accumulator = self.accumulator
        try:
            if self._goes_back and not accumulator.subtract(delta):
                raise mismatch(self.name, self.span)
            before = accumulator.value()
            if not self._goes_back:
                accumulator.add(delta)
        except NonFiniteError as error:
            raise self._not_finite(error) from None
        if before.is_floating_point() or before.is_complex():
            self.require_grad_mode("advance")
            before = before.detach().requires_grad_(torch.is_grad_enabled())  # in both sweeps: kernels depend on it
        self._before = before
        if self.reverses and delta.requires_grad:
            self._edge = get_gradient_edge(delta), delta.dtype  # as it is now: the model may go on to write to it
        self._following = PrefixSum(self._like, _link=_Following(self, delta))
        return before, self._following

    def around(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The sum before the chunk, once it has been moved on by `delta`, and after it."""
        if self._before is None:
            raise ModelError(f"state {self.name}: the value of a state was read when its sweep was over")
        accumulator = self.accumulator
        try:
            if self.from_tape:
                if self._after is None:
                    raise ModelError(
                        f"state {self.name}: its value was read in the backward pass of {self.span}, and not before; "
                        "expected the same reads when activation checkpointing runs a part again"
                    )
                return self._before, self._after
            if not self._goes_back:
                self._after = accumulator.value()
                return self._before, self._after
            accumulator.add(delta)
            after = accumulator.value()
            accumulator.undo()
        except NonFiniteError as error:
            raise self._not_finite(error) from None
        return self._before, after

    def value_of(self, state: PrefixSum) -> Tensor:
        raise ModelError(
            "the value of a PrefixSum was read before advance within a sweep, where it is not known yet; "
            "take it from `before, following = state.advance(delta)` (delta may be zeros)"
        )

    def _not_finite(self, error: NonFiniteError) -> NonFiniteError:
        return NonFiniteError(
            f"state {self.name}, {self.span}: {error}; expected finite values. Look for an overflow in the layer that "
            "owns this state (a learning rate too high, 16-bit features)"
        )

    def take(self, returned: Any) -> None:
        if returned is not (self._bound if self._following is None else self._following):
            raise self.wrong(returned)

    def checksum(self) -> Tensor:
        return checksum(self.accumulator.data)

    @property
    def checked(self) -> int:
        return self.span.start if self._goes_back else self.span.stop

    def look(self) -> Tensor | None:
        return self.accumulator.looks()

    def seen(self, number: int) -> bool:
        try:
            return self.accumulator.settle(number)
        except NonFiniteError as error:
            raise self._not_finite(error) from None

    def enter_backward(self) -> None:
        super().enter_backward()
        self._step_back()

    def _step_back(self) -> None:
        """Stand before the chunk, if it was run from there."""
        if self._before is not None and not self._goes_back and not self.from_tape:
            self.accumulator.undo()
            self.accumulator.done(log=False)
            self._goes_back = True

    def roots(self) -> list[Root]:
        if self._edge is None or self._adjoint is None:
            return []
        edge, dtype = self._edge
        return [Root(edge, _of_delta(self._adjoint, dtype))]

    def sources(self) -> list[Tensor]:
        return [self._before] if self._before is not None and self._before.requires_grad else []

    def _settle(self) -> None:
        if self._before is not None:
            if self.reverses and self._before.grad is not None:  # beside what passes straight through the addition
                of_before, self._before.grad = self._before.grad, None
                self._adjoint = of_before if self._adjoint is None else self._adjoint + of_before
            if self.position == self.span.start:
                self._step_back()
            elif not self.from_tape:
                again = self.purpose is Purpose.AGAIN and not self.finer  # a chunk that was on a tape before
                self.accumulator.done(log=self._rolls_back and (again or self.purpose is Purpose.FORWARD))
        self._forget()

    def rewind(self) -> None:
        if self._before is not None:
            self._step_back()
            self.position = self.span.start
        self._forget()

    def _forget(self) -> None:
        self._bound = self._following = self._before = self._after = self._edge = None

    def keep(self, store: Store, *, whole: bool) -> _Kept | None:
        if self._rolls_back and not whole:
            return None
        live = self.accumulator.snapshot()
        self._kept_scales[live.scales.data_ptr()] = live.scales
        return _Kept(store.put(self.index, live.data), live._replace(data=live.data.new_empty(0)))

    def load(self, store: Store, token: _Kept, position: int) -> None:
        self.accumulator.restore(token.snapshot._replace(data=store.get(token.handle).clone()))
        self.position = position

    def drop(self, store: Store, token: _Kept) -> None:
        store.free(token.handle)

    def fetch(self, store: Store, token: _Kept) -> None:
        store.fetch(token.handle)

    def pack(self, token: _Kept) -> Any:
        return [tuple(token.handle), tuple(token.snapshot)]

    def unpack(self, packed: Any) -> _Kept:
        handle, snapshot = packed
        return _Kept(Handle(*handle), Snapshot(*snapshot))

    def final(self) -> PrefixSum:
        assert not self._goes_back  # the last chunk's end state is noted when it runs first
        return PrefixSum(self.accumulator.value().detach().clone())

    @property
    def nbytes(self) -> int:
        live = self.accumulator.snapshot().scales
        kept = sum(scales.nbytes for scales in self._kept_scales.values() if scales is not live)
        return self.accumulator.nbytes + kept + (0 if self._adjoint is None else self._adjoint.nbytes)

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "adjoint": self._adjoint, "accumulator": self.accumulator.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position, self._adjoint = state["position"], state["adjoint"]
        self.accumulator.load_state(state["accumulator"])
