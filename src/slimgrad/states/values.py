"""Python values that cannot change (a position, a flag, None): kept by reference, compared by their text."""

from __future__ import annotations

import hashlib
from enum import Enum, Flag
from numbers import Number
from typing import Any, cast

import torch
from torch import Tensor

from slimgrad.errors import InputError, ModelError, SweepError
from slimgrad.states.base import Carrier, Setting, State
from slimgrad.sweep.kinds import subclasses
from slimgrad.sweep.store import Store


class ValueCarrier(Carrier):
    """Carries a Python value."""

    of_chunk = ()

    def __init__(self, setting: Setting, initial: Any) -> None:
        super().__init__(setting)
        if not is_plain_value(initial):
            raise ModelError(
                f"state {self.name} is {described(initial)}: {_EXPECTED}. For an object that holds tensors, register "
                "its type as a pytree (torch.utils._pytree.register_dataclass, register_pytree_node), or return a dict "
                "of its tensors as the state"
            )
        self.value = self._returned = initial
        self._token = (initial,)  # the same for all slots between which it did not change

    def _bind(self) -> Any:
        self._returned = self.value
        return self.value

    def take(self, returned: Any) -> None:
        if not is_plain_value(returned):
            begun = "None" if self.value is None else described(self.value)
            raise ModelError(
                f"state {self.name} began as {begun} and came back as {described(returned)} in tokens "
                f"{self.span.start} to {self.span.stop - 1}: {_EXPECTED}. Begin with zeros: return from initial_state "
                "tensors of the shapes that forward returns"
            )
        self._returned = returned

    def checksum(self) -> int:
        text = f"{type(self._returned).__qualname__} {self._returned!r}"
        return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), signed=True)

    def _settle(self) -> None:
        if self.position == self.span.stop:
            self.value = self._returned

    def rewind(self) -> None:
        self._returned = self.value

    def keep(self, store: Store, *, whole: bool) -> tuple[Any]:
        if self._token[0] is not self.value:
            self._token = (self.value,)
        return self._token

    def load(self, store: Store, token: tuple[Any], position: int) -> None:
        (self.value,), self.position = token, position

    def pack(self, token: tuple[Any]) -> Any:
        return (packed_value(self.name, token[0]),)

    def unpack(self, packed: Any) -> tuple[Any]:
        return (unpacked_value(packed[0]),)

    def final(self) -> Any:
        return self._returned

    def set_adjoint(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            raise SweepError(f"state {self.name} is a Python value and takes no gradient")

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "value": self.pack((self.value,)), "returned": self.pack((self._returned,))}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        (value,), (self._returned,) = self.unpack(state["value"]), self.unpack(state["returned"])
        self.value = value


_EXPECTED = (
    "expected a tensor, a PrefixSum, a Growing, or a plain value (None, a number, a string, bytes, an enum, a tuple of "
    "these), in dicts, lists, tuples or registered pytrees"
)


def is_plain_value(x: Any) -> bool:
    """Whether `x` is a Python value that nobody can change, and that holds no tensor."""
    if isinstance(x, tuple):
        return all(is_plain_value(part) for part in cast("tuple[Any, ...]", x))
    return x is None or isinstance(x, Number | str | bytes | Enum | torch.dtype | torch.device)


def packed_value(name: str, x: Any) -> Any:
    """A leaf `x` of a state, called `name`, as a file can hold it that is read without running code.

    Tensors and `State`s are as they are.

    Raises:
        InputError: there is no such form.
    """
    if isinstance(x, tuple):
        return tuple(packed_value(name, part) for part in cast("tuple[Any, ...]", x))
    if isinstance(x, Enum):  # a combination of flags has no name of its own
        return {"enum": _type_name(type(x)), "member": x.value if isinstance(x, Flag) else x.name}
    if isinstance(x, bytes):
        return {"bytes": x.hex()}
    if not (isinstance(x, Tensor | State) or type(x) in _IN_FILES) or (isinstance(x, int) and x.bit_length() > 2000):
        raise InputError(f"state {name} holds {described(x)}, which cannot be saved; expected a plain value")
    return x


def unpacked_value(x: Any) -> Any:
    """What was `packed`.

    Raises:
        InputError: an enum that nobody has defined here.
    """
    if isinstance(x, tuple):
        return tuple(unpacked_value(part) for part in cast("tuple[Any, ...]", x))
    if not isinstance(x, dict):
        return x
    if "bytes" in x:
        return bytes.fromhex(x["bytes"])
    kind: Any = {_type_name(kind): kind for kind in subclasses(Enum)}.get(x["enum"])
    if kind is None:
        raise InputError(f"saved with a state that holds {x['enum']}, which is not known here; import its module first")
    return kind(x["member"]) if issubclass(kind, Flag) else kind[x["member"]]


_IN_FILES = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def _type_name(kind: type) -> str:
    """By which a file names a type."""
    return f"{kind.__module__}.{kind.__qualname__}"


def described(x: Any) -> str:
    """The type of `x`, and of what it holds."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(cast('list[Any]', x))}"
    return f"a {type(x).__name__}"
