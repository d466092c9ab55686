"""Carry plain tensors and Python values: kept, or recomputed."""

from __future__ import annotations

import hashlib
import weakref
from enum import Enum
from numbers import Number
from typing import Any, cast

import torch
from torch import Tensor

from slimgrad.errors import ModelError, SweepError
from slimgrad.sweep.accumulator import checksum
from slimgrad.sweep.carriers.base import Carrier, Mode, Root
from slimgrad.sweep.store import Handle, Store


def version(x: Tensor) -> int:
    """How often torch saw `x` written to. Inference tensors do not count."""
    return 0 if x.is_inference() else x._version


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
        self._version = version(self.value)
        self._leaf = self.value.detach()
        # in both sweeps, since torch chooses kernels by it
        if torch.is_grad_enabled() and (self._leaf.is_floating_point() or self._leaf.is_complex()):
            self._leaf.requires_grad_()
        return self._leaf

    def take(self, returned: Any) -> None:
        if not isinstance(returned, Tensor):
            raise ModelError(
                f"state {self.name}: expected a tensor, as the model was given; got {_described(returned)}. Return a "
                "tensor in every chunk"
            )
        if version(self.value) != self._version:
            raise ModelError(
                f"state {self.name} was modified in place in chunk {self.chunk}; expected a new tensor (the old one "
                "is still needed on the way back). Use out-of-place operations, or clone the state first"
            )
        if self.reverses:
            self._returned = returned
        elif returned is not self._leaf:
            self.value = _own(returned)

    def roots(self) -> list[Root]:
        if self._returned is None or self._adjoint is None or not self._returned.requires_grad:
            return []
        return [Root(self._returned, self._adjoint)]

    def sources(self) -> list[Tensor]:
        return [self._leaf] if self._leaf is not None and self._leaf.requires_grad else []

    def settle(self) -> None:
        if self._leaf is not None and self.reverses:
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
        x = self.value if self._returned is None else self._returned
        # a copy: what the model returned may be a part of its inputs, its weights or its activations
        return x.detach().clone(memory_format=torch.contiguous_format)

    def adjoint(self) -> Tensor | None:
        return self._adjoint

    def set_adjoint(self, gradient: Tensor) -> None:
        self._adjoint = gradient

    @property
    def nbytes(self) -> int:
        return self.value.nbytes + (0 if self._adjoint is None else self._adjoint.nbytes)


class ValueCarrier(Carrier[list[Any]]):
    """Carries a Python value that cannot change (a position, a flag, None): kept by reference, compared by its text."""

    def __init__(self, index: int, name: str, initial: Any) -> None:
        super().__init__(index, name)
        if not is_plain_value(initial):
            raise ModelError(
                f"state {name} is {_described(initial)}: {_EXPECTED}. For an object that holds tensors, register its "
                "type as a pytree (torch.utils._pytree.register_dataclass, register_pytree_node), or return a dict of "
                "its tensors as the state"
            )
        self.value = initial
        self._returned: Any = initial

    def _bind(self) -> Any:
        return self.value

    def take(self, returned: Any) -> None:
        if not is_plain_value(returned):
            begun = "None" if self.value is None else _described(self.value)
            raise ModelError(
                f"state {self.name} began as {begun} and came back as {_described(returned)} in chunk {self.chunk}: "
                f"{_EXPECTED}. Begin with zeros: return from initial_state tensors of the shapes that forward returns"
            )
        self._returned = returned
        if self.mode in (Mode.FORWARD, Mode.AGAIN):
            self.value = returned

    def keep(self, store: Store, *, rolls_back: bool) -> list[Any]:
        return [self.value]

    def load(self, store: Store, token: list[Any]) -> None:
        (self.value,) = token

    def checksum(self) -> int:
        text = f"{type(self._returned).__qualname__} {self._returned!r}"
        return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), signed=True)

    def final(self) -> Any:
        return self._returned

    def adjoint(self) -> None:
        return None

    def set_adjoint(self, gradient: Tensor) -> None:
        raise SweepError(f"state {self.name} is a Python value and takes no gradient")


_EXPECTED = (
    "expected a tensor, a PrefixSum, a Growing, or a plain value (None, a number, a string, bytes, an enum, a tuple of "
    "these), in dicts, lists, tuples or registered pytrees"
)


def is_plain_value(x: Any) -> bool:
    """Whether `x` is a Python value that nobody can change, and that holds no tensor."""
    if isinstance(x, tuple):
        return all(is_plain_value(part) for part in cast("tuple[Any, ...]", x))
    return x is None or isinstance(x, Number | str | bytes | Enum | torch.dtype | torch.device)


def _described(x: Any) -> str:
    """The type of `x`, and of what it holds."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(cast('list[Any]', x))}"
    return f"a {type(x).__name__}"


def _own(x: Tensor) -> Tensor:
    """`x` without a graph, contiguous and aligned as a copy from the store will be (other layouts, other bits), and
    without holding a larger storage alive (the last rows of a chunk's activations).
    """
    x = x.detach()
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)
