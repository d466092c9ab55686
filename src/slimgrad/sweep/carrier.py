"""How a sweep carries each leaf of the state from chunk to chunk, forward and back.

One carrier per leaf, for the length of one run. A chunk is one round of

    bind -> (the model runs) -> take -> [backward] -> settle

`bind` hands the model its leaf, `take` receives the one it returned, and in the reverse sweep names the roots through
which the adjoint (the gradient of the state after the chunk) enters the chunk's graph; `settle` reads off the adjoint
of the state before the chunk.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from array import array
from enum import Enum, auto
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from slimgrad.errors import ModelError, NonFiniteError, StateMismatchError, SweepError
from slimgrad.sweep.accumulator import Accumulator, Snapshot, checksum
from slimgrad.sweep.state import SPENT, Growing, PrefixSum
from slimgrad.sweep.store import Handle, Store

Token = TypeVar("Token")


class Mode(Enum):
    """What a chunk is run for."""

    FORWARD = auto()  # the first time: states only, and bits are recorded
    AGAIN = auto()  # recomputed from a kept state: bits are checked
    FROM_BEFORE = auto()  # with a graph, from the state before the chunk
    ROLL_BACK = auto()  # with a graph, from the state after the chunk


class Root(NamedTuple):
    """A tensor of the chunk's graph, and the cotangent that enters there."""

    tensor: Tensor
    cotangent: Tensor


class Carrier(ABC, Generic[Token]):
    """One leaf of the state. `index` says which, `name` says it to people."""

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.chunk = 0
        self.mode = Mode.FORWARD
        self.peeking = False  # the chunk will be run a second time from the same live state
        self.in_backward = False  # a call of the model then is activation checkpointing, running the chunk again

    def bind(self, mode: Mode, chunk: int) -> Any:
        """The leaf to hand to the model."""
        self.mode, self.chunk, self.in_backward = mode, chunk, False
        return self._bind()

    @abstractmethod
    def _bind(self) -> Any: ...

    @abstractmethod
    def take(self, returned: Any) -> None:
        """Receive the leaf that the model returned."""

    def roots(self) -> list[Root]:
        """Where the adjoint enters the chunk's graph."""
        return []

    def sources(self) -> list[Tensor]:
        """The leaves of the chunk's graph that stand for the state before it."""
        return []

    def settle(self) -> None:
        """After the backward pass: the adjoint is now that of the state before the chunk."""

    @abstractmethod
    def keep(self, store: Store, *, rolls_back: bool) -> Token | None:
        """Keep what is needed to stand here again; None if nothing is."""

    @abstractmethod
    def load(self, store: Store, token: Token) -> None:
        """Stand where `token` was kept."""

    def drop(self, store: Store, token: Token) -> None:
        """Forget `token`."""

    def checksum(self) -> Tensor | None:
        """64 bits of the state after chunk `checked_chunk`; None where the carrier compares whole rows itself."""
        return None

    @property
    def checked_chunk(self) -> int:
        """Which chunk's end state `checksum` speaks of; -1 is the initial state."""
        return self.chunk

    @abstractmethod
    def final(self) -> Any:
        """The live leaf, free of any sweep."""

    @abstractmethod
    def adjoint(self) -> Tensor | None:
        """The gradient of the live state; None stands for zeros."""

    @abstractmethod
    def set_adjoint(self, gradient: Tensor) -> None:
        """Take the gradient of the final state from whoever holds the rest of the sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes held for this leaf beside what the store keeps."""
        return 0

    def wrong(self, returned: Any) -> ModelError:
        """The model returned something that is not this state, moved on once."""
        return ModelError(
            f"state {self.name}: expected the object that advance/append returned, or the one the model was given "
            f"(untouched); got {returned!r}. Return exactly one of them from forward and advance"
        )


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
        return g, g.to(cast(Any, ctx).delta_dtype), None


class SumCarrier(Carrier[tuple[Handle, Snapshot]]):
    """Carries a `PrefixSum` in an exact accumulator."""

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

    def _bind(self) -> PrefixSum:
        self._following = self._delta = self._before = self._after = None
        self._bound = PrefixSum(self.accumulator.value(), _link=self)
        return self._bound

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
        if self.mode in (Mode.FROM_BEFORE, Mode.ROLL_BACK) and before.dtype.is_floating_point:
            if not torch.is_grad_enabled():
                raise ModelError(
                    f"state {self.name}: advance was called without gradients in the reverse sweep; expected them on. "
                    "Remove torch.no_grad, and use torch.utils.checkpoint with use_reentrant=False"
                )
            before = before.detach().requires_grad_()
        self._delta, self._before, self._after = delta.detach(), before, after
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
        if self._before is not None:  # an untouched sum passes its adjoint through
            self._adjoint, self._before.grad = self._before.grad, None
        if self._delta is not None and self.logs and self.mode is Mode.FROM_BEFORE:
            self.accumulator.subtract(self._delta)  # the last chunk: from here on the sum rolls back
        self._bound = self._following = self._delta = self._before = self._after = None

    def keep(self, store: Store, *, rolls_back: bool) -> tuple[Handle, Snapshot] | None:
        if rolls_back:
            return None
        snapshot = self.accumulator.snapshot()
        return store.put(self.index, snapshot.data), snapshot._replace(data=snapshot.data.new_empty(0))

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
        return self.accumulator.nbytes + (0 if self._adjoint is None else self._adjoint.nbytes)


class _Append(torch.autograd.Function):
    """All rows so far, as a view of the buffer; backward adds the old rows' gradient into the gradient buffer."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, anchor: Tensor, carrier: GrowingCarrier, start: int) -> Tensor:
        cast(Any, ctx).carrier, cast(Any, ctx).start, cast(Any, ctx).dtype = carrier, start, rows.dtype
        return carrier.prefix(start + rows.shape[1])

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (g,), start = grad_outputs, cast(int, cast(Any, ctx).start)
        if start:
            cast(GrowingCarrier, cast(Any, ctx).carrier).add_gradient(g[:, :start])
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
            wide = torch.float32 if g.dtype in (torch.bfloat16, torch.float16) else g.dtype
            shape = (self._buffer.shape[0], self._written, *self._buffer.shape[2:])
            self._gradient = torch.zeros(shape, dtype=wide, device=g.device)
        self._gradient[:, : g.shape[1]] += g

    def _bind(self) -> Growing:
        self._following = self._rows = None
        if self.chunk == len(self._starts):
            self._starts.append(self._length)
        self._length = self._starts[self.chunk]
        self._bound = Growing(self._buffer[:, :0], _link=self)
        return self._bound

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
        if self.mode in (Mode.FORWARD, Mode.AGAIN) or not rows.is_floating_point():
            rows, all_rows = rows.detach(), self.prefix(stop)
        else:
            if self._anchor is None:
                self._anchor = torch.zeros((), device=rows.device).requires_grad_()
            all_rows = cast(Tensor, _Append.apply(rows, self._anchor, self, start))
        following = Growing(all_rows, _link=SPENT)
        if not self.in_backward:
            self._rows, self._following = rows, following
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
        if self._rows is None or self._gradient is None or not self._rows.requires_grad:
            return []
        start = self.length
        return [Root(self._rows, self._gradient[:, start : start + self._rows.shape[1]].to(self._rows.dtype))]

    def sources(self) -> list[Tensor]:
        return [] if self._anchor is None else [self._anchor]

    def settle(self) -> None:
        self._length = self.length
        self._bound = self._following = self._rows = None

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


class _Kept:
    """A kept tensor, shared by the slots between which it did not change (a constant is kept once)."""

    def __init__(self, handle: Handle, owner: Tensor) -> None:
        self.handle, self.users = handle, 0
        self.owner = weakref.ref(owner)  # what was copied: while it lives, the same object needs no second copy


class TensorCarrier(Carrier[_Kept]):
    """Carries a plain tensor: any function of time, kept or recomputed. Integers and booleans without gradient."""

    def __init__(self, index: int, name: str, initial: Tensor) -> None:
        super().__init__(index, name)
        self.value = initial.detach().clone(memory_format=torch.contiguous_format)  # a model may write to it
        self._leaf: Tensor | None = None
        self._returned: Tensor | None = None
        self._adjoint: Tensor | None = None
        self._kept: _Kept | None = None

    def _bind(self) -> Tensor:
        self._returned = None
        self._version = self.value._version
        if self.mode in (Mode.FROM_BEFORE, Mode.ROLL_BACK):
            self._leaf = self.value.detach()
            if self._leaf.is_floating_point() or self._leaf.is_complex():
                self._leaf.requires_grad_()
            return self._leaf
        return self.value

    def take(self, returned: Any) -> None:
        if not isinstance(returned, Tensor):
            raise ModelError(f"state {self.name}: expected a tensor, as the model was given; got {type(returned)}")
        if self.value._version != self._version:
            raise ModelError(
                f"state {self.name} was modified in place in chunk {self.chunk}; expected a new tensor (the old one "
                "is still needed on the way back). Use out-of-place operations on the state"
            )
        if self.mode in (Mode.FORWARD, Mode.AGAIN):
            if returned is not self.value:
                self.value = _own(returned)
        else:
            self._returned = returned

    def roots(self) -> list[Root]:
        if self._returned is None or self._adjoint is None or not self._returned.requires_grad:
            return []
        return [Root(self._returned, self._adjoint)]

    def sources(self) -> list[Tensor]:
        return [self._leaf] if self._leaf is not None and self._leaf.requires_grad else []

    def settle(self) -> None:
        if self._leaf is not None:
            self._adjoint, self._leaf.grad = self._leaf.grad, None
        self._leaf = self._returned = None

    def keep(self, store: Store, *, rolls_back: bool) -> _Kept | None:
        if self._kept is None or self._kept.owner() is not self.value:
            self._kept = _Kept(store.put(self.index, self.value), self.value)
        self._kept.users += 1
        return self._kept

    def load(self, store: Store, token: _Kept) -> None:
        owner = token.owner()
        self.value = store.get(token.handle) if owner is None else owner

    def drop(self, store: Store, token: _Kept) -> None:
        token.users -= 1
        if token.users == 0:
            store.free(token.handle)
            if self._kept is token:
                self._kept = None

    def checksum(self) -> Tensor:
        return checksum(self.value if self._returned is None else self._returned)

    def final(self) -> Tensor:
        return self.value if self._returned is None else self._returned.detach()

    def adjoint(self) -> Tensor | None:
        return self._adjoint

    def set_adjoint(self, gradient: Tensor) -> None:
        self._adjoint = gradient

    @property
    def nbytes(self) -> int:
        return self.value.nbytes + (0 if self._adjoint is None else self._adjoint.nbytes)


class ValueCarrier(Carrier[list[Any]]):
    """Carries a Python value (a position, a flag, None): kept by reference, compared by equality."""

    def __init__(self, index: int, name: str, initial: Any) -> None:
        super().__init__(index, name)
        self.value = initial
        self._returned: Any = initial

    def _bind(self) -> Any:
        return self.value

    def take(self, returned: Any) -> None:
        self._returned = returned
        if self.mode in (Mode.FORWARD, Mode.AGAIN):
            self.value = returned

    def keep(self, store: Store, *, rolls_back: bool) -> list[Any]:
        return [self.value]

    def load(self, store: Store, token: list[Any]) -> None:
        (self.value,) = token

    def checksum(self) -> Tensor:
        plain = isinstance(self._returned, (bool, int, float, str, type(None)))
        return torch.tensor(hash(self._returned) if plain else 0)

    def final(self) -> Any:
        return self._returned

    def adjoint(self) -> None:
        return None

    def set_adjoint(self, gradient: Tensor) -> None:
        raise SweepError(f"state {self.name} is a Python value and takes no gradient")


def carrier_for(leaf: Any, index: int, name: str, *, rolls_back: bool, expected_growth: float) -> Carrier[Any]:
    """The carrier for one leaf of an initial state."""
    if isinstance(leaf, PrefixSum):
        return SumCarrier(index, name, leaf, logs=rolls_back)
    if isinstance(leaf, Growing):
        return GrowingCarrier(index, name, leaf, expected_growth=expected_growth)
    if isinstance(leaf, Tensor):
        return TensorCarrier(index, name, leaf)
    return ValueCarrier(index, name, leaf)


def mismatch(name: str, chunk: int) -> StateMismatchError:
    """The bits of a state came out differently the second time."""
    return StateMismatchError(
        f"state {name}, chunk {chunk}: rebuilt with other bits than in the forward sweep, so the gradient would not be "
        "exact. Expected the same computation twice; look for a random draw from another generator (Python's, "
        "NumPy's), a nondeterministic kernel (torch.use_deterministic_algorithms), `advance` computing otherwise than "
        "`forward`, or a weight, a buffer or the number of threads changed in between"
    )


def _bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals itself and -0 differs from 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(integers[x.element_size()]) if not x.is_complex() else torch.view_as_real(x)


def _own(x: Tensor) -> Tensor:
    """`x` without a graph, contiguous and aligned as a copy from the store will be (other layouts, other bits), and
    without holding a larger storage alive (the last rows of a chunk's activations).
    """
    x = x.detach()
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)
