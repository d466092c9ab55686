"""What a model changes while a chunk runs, and whether it reads that again.

Each chunk runs twice, so whatever a run leaves behind for the next one would make the two differ: a position counted in
an attribute, a hidden state kept on the module, running statistics in a buffer, a weight that is clipped on the way.
Many such changes are harmless, because they are written and never read (the weight that `weight_norm` makes anew in
every forward, a table kept for the next call). So around the first run of each of the model's methods everything that
its modules hold is noted. Where something changed, the chunk is run once more from the same state and seed, with the
changes in place: the same bits mean that nobody reads them; other bits are refused, by name.

Cost: two looks through the modules' attributes for each method and call; one chunk more, forward, where any changed.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.errors import ModelError
from slimgrad.states.base import State
from slimgrad.states.checksum import checksum
from slimgrad.states.tensors import version
from slimgrad.states.values import is_plain_value
from slimgrad.sweep import tree

_DEPTH = 6  # how far into nested containers and objects
_ENTRIES = 1000  # of one container
_BYTES = 1 << 20  # of one array
_OWN = frozenset(vars(nn.Module())) - {"training"} | {"forward"}  # torch's own entries, and what `fused` sets
_OPAQUE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)


class Notes:
    """What the modules of a model and their classes hold at one moment.

    Tensors are noted by identity and version, plain values and generators by value, containers and objects entry by
    entry. What was noted by identity is held, so that no new object can take its place unseen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: list[Any] = []
        self._notes: dict[tuple[int, str], tuple[str, Any]] = {}
        seen: set[int] = set()
        for owner, name, shown, value in _places(model):
            self._notes[id(owner), name] = shown, self._note(value, _DEPTH, seen)

    def changed_since(self, before: Notes) -> list[str]:
        """The names of what is new, gone or other than before."""
        gone = ("", object())
        return [
            (self._notes.get(key) or before._notes[key])[0]
            for key in {**before._notes, **self._notes}
            if self._notes.get(key, gone)[1] != before._notes.get(key, gone)[1]
        ]

    def empty(self) -> set[str]:
        """The names of what is None."""
        return {shown for shown, note in self._notes.values() if note == ("NoneType", "None")}

    def _note(self, value: Any, depth: int, seen: set[int]) -> Any:
        if is_plain_value(value):
            return type(value).__name__, repr(value)
        self._held.append(value)
        if isinstance(value, Tensor):
            return id(value), version(value)
        if isinstance(value, torch.Generator):
            return id(value), zlib.crc32(value.get_state().numpy().tobytes())
        if isinstance(value, random.Random):
            return id(value), hash(value.getstate())
        if isinstance(value, GeneratorType):
            return (
                id(value),
                value.gi_frame and value.gi_frame.f_lasti,
                value.gi_frame and repr(value.gi_frame.f_locals),
            )
        if isinstance(value, Iterator):
            return id(value), length_hint(cast("Iterator[Any]", value), -1), repr(value)
        if isinstance(value, _OPAQUE) or depth == 0 or id(value) in seen:
            return id(value)
        seen.add(id(value))
        try:
            content = memoryview(value)  # bytearray, array, ndarray
        except (TypeError, ValueError, BufferError):
            return id(value), tuple(self._note(part, depth - 1, seen) for part in _parts(value))
        return id(value), zlib.crc32(content.tobytes()) if content.nbytes <= _BYTES else 0


def _places(model: nn.Module) -> Iterator[tuple[Any, str, str, Any]]:
    """Whatever a run may change: (owner, name, the name shown, value)."""
    kinds: dict[type, None] = {}
    for path, module in model.named_modules():
        kinds.update(dict.fromkeys(type(module).__mro__))
        for name, value in attributes(module):
            yield module, name, f"{path}.{name}" if path else name, value
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"):
            for name, value in vars(kind).items():
                if not (name.startswith("__") or callable(value)):
                    yield kind, name, f"{kind.__name__}.{name}", value


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's plain attributes, its mode among them, and its buffers (whose values `guard` looks at)."""
    for name, value in module.__dict__.items():
        if name not in _OWN:
            yield name, value
    yield from module._buffers.items()  # pyright: ignore[reportPrivateUsage]


def _parts(value: Any) -> Iterator[Any]:
    """What a container or an object holds, and how much of it."""
    entries: Iterable[Any] = ()
    if isinstance(value, dict):
        entries = (part for pair in cast("dict[Any, Any]", value).items() for part in pair)
        yield len(cast("dict[Any, Any]", value))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        entries = cast("Iterable[Any]", value)
        yield len(cast("list[Any]", value))
    for _, part in zip(range(_ENTRIES), entries, strict=False):
        yield part
    if isinstance(value, nn.Module):  # one that is no submodule, in a list
        yield from (part for _, part in attributes(value))
        return
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(value, name, None)


class _Repeated:
    """Between a state and its carrier, for a chunk that is run twice: the carrier hears of the first run only."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._first: dict[str, tuple[Any, Any]] = {}
        self.again = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._link, name)
        if not callable(found) or name == "value_of":
            return found

        def call(*given: Any) -> Any:
            return self._call(name, found, given)

        return call

    def _call(self, name: str, move: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        if not self.again or name not in self._first:
            self._first[name] = [x.detach() if isinstance(x, Tensor) else x for x in given], move(*given)
        elif [_bits(x) for x in given] != [_bits(x) for x in self._first[name][0]]:
            raise _OtherBitsError
        return self._first[name][1]


class _OtherBitsError(Exception):
    """The second run of a chunk gave a state another contribution."""


class Watch:
    """Runs a model's methods for the first time, and looks at what they change."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._by_advance: set[str] = set()

    def run(self, method: str, call: Callable[[tree.Tree], Any], state: tree.Tree, reseeded: Callable[[], Any]) -> Any:
        """`call(state)`, and once more if attributes changed meanwhile.

        Args:
            method: "forward" or "advance".
            call: runs it on a chunk.
            state: the state before the chunk, as the sweep gives it.
            reseeded: a context in which the generators draw what they drew in the first run.

        Raises:
            ModelError: the second run gave other bits, so that what was written is read; or the state was written to.
        """
        leaves, spec = tree.flatten(state)
        before, bits = Notes(self._model), _bits_of_tensors(leaves)
        linked = [leaf for leaf in leaves if isinstance(leaf, State)]
        links = [leaf._link for leaf in linked]  # pyright: ignore[reportPrivateUsage]
        repeated = [None if link is None else _Repeated(link) for link in links]
        versions = [version(x) for x in leaves if isinstance(x, Tensor)]
        try:
            for leaf, link in zip(linked, repeated, strict=True):
                cast(Any, leaf)._link = link
            result = call(tree.unflatten(leaves, spec))
            changed = Notes(self._model).changed_since(before)
            if versions != [version(x) for x in leaves if isinstance(x, Tensor)]:
                return result  # written to in place: refused by the name of the state
            if bits != _bits_of_tensors(leaves):
                raise ModelError(
                    f"{method} wrote to its state in place, unseen by torch (through .data or NumPy); expected a new "
                    "tensor, since the old one is still needed on the way back. Clone the state first"
                )
            if changed:
                for link in repeated:
                    if link is not None:
                        link.again = True
                self._run_again(changed, result, lambda: call(tree.unflatten(leaves, spec)), reseeded)
        finally:
            for leaf, link in zip(linked, links, strict=True):
                cast(Any, leaf)._link = link
        if method == "advance":
            self._by_advance = set(changed) - before.empty()  # a table that is made when it is first wanted may stay
        elif method == "forward" and not self._by_advance <= set(changed):
            raise ModelError(
                f"advance changed what forward leaves alone ({', '.join(sorted(self._by_advance - set(changed)))}); "
                "expected it to compute the state as forward does, and nothing else"
            )
        return result

    def _run_again(self, changed: list[str], result: Any, call: Callable[[], Any], reseeded: Callable[[], Any]) -> None:
        try:
            with reseeded():
                same = _same_bits(result, call())
        except _OtherBitsError:
            same = False
        if same:
            return
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ModelError(
            f"{type(self._model).__name__} changed attributes while a chunk ran ({shown}), and the same chunk gave "
            "other results when it was run again. Each chunk runs twice, so the gradient would not be exact. Carry "
            "what must be remembered in the state: begin with it in initial_state, and return it from forward"
        )


def _bits_of_tensors(leaves: Iterable[Any]) -> list[Any]:
    return [_bits(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def _same_bits(first: Any, second: Any) -> bool:
    """Whether two results of the model hold the same numbers."""
    one, other = tree.leaves(first), tree.leaves(second)
    return len(one) == len(other) and all(_bits(a) == _bits(b) for a, b in zip(one, other, strict=True))


def _bits(leaf: Any, depth: int = _DEPTH) -> Any:
    if isinstance(leaf, State):  # where it is linked, the second run was given what the first came to
        return _bits(leaf.value) if leaf._link is None else id(leaf)  # pyright: ignore[reportPrivateUsage]
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, int(checksum(leaf.to_dense() if leaf.layout is not torch.strided else leaf))
    if is_plain_value(leaf):
        return repr(leaf)
    return [_bits(part, depth - 1) for part in tree.leaves(list(_parts(leaf)))] if depth else id(leaf)
