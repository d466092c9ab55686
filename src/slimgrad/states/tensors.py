"""Plain tensors: any function of time, kept or recomputed. Integers and booleans without gradient."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import ModelError
from slimgrad.states.base import Carrier, Root, Setting
from slimgrad.states.checksum import checksum
from slimgrad.states.values import described
from slimgrad.sweep.store import Handle, Store


def version(x: Tensor) -> int:
    """How often torch saw `x` written to. Inference tensors do not count."""
    return 0 if x.is_inference() else x._version


class Kept:
    """A kept tensor, shared by the slots between which it did not change (a constant is kept once)."""

    __slots__ = ("handle", "owner", "users")  # there may be one for each chunk

    def __init__(self, handle: Handle, owner: Tensor | None = None) -> None:
        self.handle, self.users = handle, 0
        # what was copied: while it lives, the same object needs no second copy
        self.owner = (lambda: None) if owner is None else weakref.ref(owner)


class TensorCarrier(Carrier):
    """Carries a plain tensor."""

    of_chunk = ("_version", "_leaf", "_returned")

    def __init__(self, setting: Setting, initial: Tensor) -> None:
        super().__init__(setting)
        if initial.layout is not torch.strided or initial.is_nested or initial.is_quantized or initial.is_meta:
            raise ModelError(
                f"state {self.name} is a tensor whose elements do not lie in memory one after the other (sparse, "
                "nested, quantised, or on the meta device). Expected a dense one: .to_dense(), .dequantize(), or its "
                "parts as leaves of the state"
            )
        self.value = initial.detach().clone(memory_format=torch.contiguous_format)  # a model may write to it
        self._version = 0
        self._leaf: Tensor | None = None
        self._returned: Tensor | None = None
        self._kept: Kept | None = None
        self._unpacked: dict[Handle, Kept] = {}

    def _bind(self) -> Tensor:
        self._version = version(self.value)
        leaf = self.value.detach()
        # in both sweeps, since torch chooses kernels by it
        if torch.is_grad_enabled() and (leaf.is_floating_point() or leaf.is_complex()):
            leaf.requires_grad_()
        self._leaf = leaf
        return leaf

    def take(self, returned: Any) -> None:
        if not isinstance(returned, Tensor):
            raise ModelError(
                f"state {self.name}: expected a tensor, as the model was given; got {described(returned)}. Return a "
                "tensor in every chunk"
            )
        if version(self.value) != self._version:
            raise ModelError(
                f"state {self.name} was modified in place in {self.span}; expected "
                "a new tensor (the old one is still needed on the way back). Use out-of-place operations, or clone the "
                "state first"
            )
        # reversed, with its graph; forward what stays the same object needs no second copy
        self._returned = returned if self.reverses else self.value if returned is self._leaf else own(returned)

    def checksum(self) -> Tensor:
        return checksum(self.value if self._returned is None else self._returned)

    def roots(self) -> list[Root]:
        if self._returned is None or self._adjoint is None or not self._returned.requires_grad:
            return []
        return [Root(self._returned, self._adjoint)]

    def sources(self) -> list[Tensor]:
        return [self._leaf] if self._leaf is not None and self._leaf.requires_grad else []

    def _settle(self) -> None:
        assert self._leaf is not None
        assert self._returned is not None
        if self.position == self.span.start:
            if self.reverses:
                gradient, self._leaf.grad = self._leaf.grad, None
                self._adjoint = None if gradient is None else own(gradient)  # may be a part of something large
        elif not self.reverses:
            self.value = self._returned
        elif self._returned is not self._leaf:  # on a tape
            self.value = own(self._returned)
        self._leaf = self._returned = None

    def rewind(self) -> None:
        self._leaf = self._returned = None

    def keep(self, store: Store, *, whole: bool) -> Kept:
        if self._kept is None or self._kept.owner() is not self.value:
            self._kept = Kept(store.put(self.index, self.value), self.value)
        self._kept.users += 1
        return self._kept

    def load(self, store: Store, token: Kept, position: int) -> None:
        owner = token.owner()
        self.value = store.get(token.handle) if owner is None else owner
        self.position = position

    def drop(self, store: Store, token: Kept) -> None:
        token.users -= 1
        if token.users == 0:
            store.free(token.handle)
            if self._kept is token:
                self._kept = None

    def fetch(self, store: Store, token: Kept) -> None:
        if token.owner() is None:
            store.fetch(token.handle)

    def pack(self, token: Kept) -> Any:
        return tuple(token.handle)

    def unpack(self, packed: Any) -> Kept:
        token = self._unpacked.setdefault(Handle(*packed), Kept(Handle(*packed)))
        token.users += 1
        return token

    def final(self) -> Tensor:
        x = self.value if self._returned is None else self._returned
        # a copy: what the model returned may be a part of its inputs, its weights or its activations
        return x.detach().clone(memory_format=torch.contiguous_format)

    @property
    def nbytes(self) -> int:
        return self.value.nbytes + (0 if self._adjoint is None else self._adjoint.nbytes)

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "value": self.value.clone(), "adjoint": self._adjoint}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position, self.value, self._adjoint = state["position"], state["value"], state["adjoint"]


def own(x: Tensor) -> Tensor:
    """`x` without a graph, contiguous and aligned as a copy from the store will be (other layouts, other bits), and
    without holding a larger storage alive (the last rows of a chunk's activations).
    """
    x = x.detach()
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)
