"""Carries a `PrefixSum`: an exact accumulator, rolled back or kept."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from slimgrad.errors import ModelError, NonFiniteError
from slimgrad.sweep.accumulator import Accumulator, Snapshot, checksum
from slimgrad.sweep.carriers.base import Carrier, Mode, Root, mismatch
from slimgrad.sweep.compiled import not_traced
from slimgrad.sweep.state import SPENT, PrefixSum
from slimgrad.sweep.store import Handle, Store


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
        dtype = cast(torch.dtype, cast(Any, ctx).delta_dtype)
        of_delta = g.real if g.is_complex() and not dtype.is_complex else g  # a real contribution to a complex sum
        return g, of_delta.to(dtype), None


class SumCarrier(Carrier[tuple[Handle, Snapshot]]):
    """Carries a `PrefixSum` in an exact accumulator.

    A kept copy is the steps, in the store, and the quanta by reference: these are replaced when one of them widens,
    which is seldom, so that copies share them.
    """

    def __init__(self, index: int, name: str, initial: PrefixSum, *, logs: bool) -> None:
        super().__init__(index, name)
        try:
            self.accumulator = Accumulator(initial.value)
        except NonFiniteError as error:
            raise NonFiniteError(f"initial state {name}: {error}") from None
        self.logs = logs
        self._bound: PrefixSum | None = None
        self._following: PrefixSum | None = None
        self._delta: Tensor | None = None
        self._before: Tensor | None = None
        self._after: Tensor | None = None
        self._adjoint: Tensor | None = None
        self._kept_scales: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # alive while a copy needs them

    def _bind(self) -> PrefixSum:
        self._following = self._delta = self._before = self._after = None
        self._bound = PrefixSum(self.accumulator.value(), _link=self)
        return self._bound

    @not_traced
    def advance(self, delta: Tensor) -> tuple[Tensor, PrefixSum]:
        """What `PrefixSum.advance` does within a sweep."""
        if self._before is not None and self._after is not None:
            if not self.in_backward:
                return SPENT.advance(delta)
            return self._before, self._follow(self._before, delta, self._after)
        if self._bound is None:
            raise ModelError(f"state {self.name}: advance was called on a state of a sweep that is over")
        accumulator = self.accumulator
        try:
            if self.mode is Mode.ROLL_BACK:
                after = accumulator.value()
                if not accumulator.subtract(delta):
                    raise mismatch(self.name, self.chunk)
                before = accumulator.value()
            else:
                before = accumulator.value()
                accumulator.add(delta, log=self.logs and self.mode is not Mode.AGAIN and not self.peeking)
                after = accumulator.value()
        except NonFiniteError as error:
            raise NonFiniteError(
                f"state {self.name}, chunk {self.chunk}: {error}; expected finite values. Look for an overflow in the "
                "layer that owns this state (a learning rate too high, 16-bit features)"
            ) from None
        if before.is_floating_point() or before.is_complex():
            self.require_grad_mode("advance")
            before = before.detach().requires_grad_(torch.is_grad_enabled())  # in both sweeps: kernels depend on it
        self._before, self._after = before, after
        if self.logs and self.mode is Mode.FROM_BEFORE:
            self._delta = delta.detach().clone()  # to go back from the last chunk, whatever the model writes to it
        self._following = self._follow(before, delta, after)
        return before, self._following

    def _follow(self, before: Tensor, delta: Tensor, after: Tensor) -> PrefixSum:
        if before.requires_grad:
            after = cast(Tensor, _Advance.apply(before, delta, after))
        return PrefixSum(after, _link=SPENT)

    def take(self, returned: Any) -> None:
        if returned is not (self._bound if self._following is None else self._following):
            raise self.wrong(returned)

    def roots(self) -> list[Root]:
        if self._following is None or self._adjoint is None or not self._following.value.requires_grad:
            return []
        return [Root(self._following.value, self._adjoint)]

    def sources(self) -> list[Tensor]:
        return [self._before] if self._before is not None and self._before.requires_grad else []

    def settle(self) -> None:
        if self._before is not None and self.reverses:  # an untouched sum passes its adjoint through
            self._adjoint, self._before.grad = self._before.grad, None
        if self._delta is not None:
            self.accumulator.subtract(self._delta)  # from here on the sum rolls back
        self._bound = self._following = self._delta = self._before = self._after = None

    def keep(self, store: Store, *, rolls_back: bool) -> tuple[Handle, Snapshot] | None:
        if rolls_back:
            return None
        live = self.accumulator.snapshot()
        self._kept_scales[id(live.scales)] = live.scales
        return store.put(self.index, live.data), live._replace(data=live.data.new_empty(0))

    def load(self, store: Store, token: tuple[Handle, Snapshot]) -> None:
        handle, snapshot = token
        self.accumulator.restore(snapshot._replace(data=store.get(handle).clone()))

    def drop(self, store: Store, token: tuple[Handle, Snapshot]) -> None:
        store.free(token[0])

    def checksum(self) -> Tensor:
        return checksum(self.accumulator.data)

    @property
    def checked_chunk(self) -> int:
        return self.chunk - 1 if self.mode is Mode.ROLL_BACK else self.chunk

    def final(self) -> PrefixSum:
        return PrefixSum(self.accumulator.value())

    def adjoint(self) -> Tensor | None:
        return self._adjoint

    def set_adjoint(self, gradient: Tensor) -> None:
        self._adjoint = gradient

    @property
    def nbytes(self) -> int:
        live = self.accumulator.snapshot().scales
        kept = sum(scales.nbytes for scales in self._kept_scales.values() if scales is not live)
        return self.accumulator.nbytes + kept + (0 if self._adjoint is None else self._adjoint.nbytes)
