"""Carry plain tensors and Python values: kept, or recomputed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import ModelError, SweepError
from slimgrad.sweep.accumulator import checksum
from slimgrad.sweep.carriers.base import Carrier, Mode, Root
from slimgrad.sweep.store import Handle, Store


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


def _own(x: Tensor) -> Tensor:
    """`x` without a graph, contiguous and aligned as a copy from the store will be (other layouts, other bits), and
    without holding a larger storage alive (the last rows of a chunk's activations).
    """
    x = x.detach()
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)
