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
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.errors import ModelError
from slimgrad.sweep import tree
from slimgrad.sweep.accumulator import checksum
from slimgrad.sweep.carriers.plain import is_plain_value, version
from slimgrad.sweep.state import Growing, PrefixSum

_DEPTH = 6  # how far into nested containers and objects
_ENTRIES = 1000  # of one container
_BYTES = 1 << 20  # of one array
_SAMPLE = 16  # elements of a weight
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
    """A module's plain attributes, its mode among them, and the buffers that it has not filled."""
    for name, value in module.__dict__.items():
        if name not in _OWN:
            yield name, value
    for name, buffer in module._buffers.items():  # pyright: ignore[reportPrivateUsage]
        if buffer is None:
            yield name, None


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
    """Between a state and its sweep, for a chunk that is run twice: the sweep hears of the first run only."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._first: tuple[Tensor, Any] | None = None
        self.again = False

    @property
    def length(self) -> int:
        return self._link.length

    def advance(self, delta: Tensor) -> Any:
        return self._call(self._link.advance, delta)

    def append(self, rows: Tensor) -> Any:
        return self._call(self._link.append, rows)

    def _call(self, move: Callable[[Tensor], Any], given: Tensor) -> Any:
        if not self.again or self._first is None:
            self._first = given.detach(), move(given)
        elif _bits(given) != _bits(self._first[0]):
            raise _OtherBitsError
        return self._first[1]


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
        linked = [leaf for leaf in leaves if isinstance(leaf, PrefixSum | Growing)]
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
            self._by_advance = set(changed)
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


def _bits(leaf: Any) -> Any:
    if isinstance(leaf, PrefixSum | Growing):
        return id(leaf)  # the second run was given what the first came to
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, int(checksum(leaf.to_dense() if leaf.layout is not torch.strided else leaf))
    return repr(leaf) if is_plain_value(leaf) else None


class Guard:
    """Refuses a model that writes to its buffers or parameters while a chunk runs.

    Args:
        model: whose.
        renormalised: parameters that may be written to: the table of an `nn.Embedding(max_norm=...)` nobody else uses.
    """

    def __init__(self, model: nn.Module, renormalised: set[int]) -> None:
        self._buffers = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()  # pyright: ignore[reportPrivateUsage]
            if buffer is not None
        ]
        self._parameters = [(name, p) for name, p in model.named_parameters() if id(p) not in renormalised]
        self._samples: list[Tensor] = []

    @contextmanager
    def watching(self, *, first: bool = False) -> Generator[None]:
        """Refuse what is written within the block.

        The first time nothing is written to buffers even so, and values are compared too: torch's batch normalisation
        writes its running statistics without counting a version, and so does a write through `.data`. Of parameters a
        few elements are compared.
        """
        copies = [buffer.clone() if first else buffer for _, _, buffer in self._buffers]
        versions = [version(x) for x in copies]
        weights = self._weights(first)
        changed: list[str] = []
        try:
            for (module, name, _), copy in zip(self._buffers, copies, strict=True):
                module._buffers[name] = copy  # pyright: ignore[reportPrivateUsage]
            yield
            for (module, name, buffer), copy, before in zip(self._buffers, copies, versions, strict=True):
                present = module._buffers.get(name)  # pyright: ignore[reportPrivateUsage]
                written = version(copy) != before or not (present is copy or _begins_with(present, copy))
                if written or (first and int(checksum(copy)) != int(checksum(buffer))):
                    changed.append(f"{type(module).__name__}.{name}")
        finally:
            for module, name, buffer in self._buffers:
                module._buffers[name] = buffer  # pyright: ignore[reportPrivateUsage]
        if changed:
            raise ModelError(
                f"the model wrote to its buffers while it ran: {', '.join(changed)}. Each chunk runs twice, so the "
                "second run would see other values and the gradient would not be exact. Put such layers in eval mode "
                "(batch normalisation), or carry what they update in the state"
            )
        after = self._weights(first)
        if weights != after:
            names = [name for (name, _), b, a in zip(self._parameters, weights, after, strict=True) if a != b]
            raise ModelError(
                f"parameters were written to while a chunk ran: {', '.join(names)}. The chunks before and after would "
                "use other weights, and the gradient would belong to neither. Clip or renormalise weights between "
                "calls, beside optimizer.step(); a table with max_norm may not be tied to another layer"
            )

    def _weights(self, sampled: bool) -> list[Any]:
        versions = [version(p) for _, p in self._parameters]
        if not sampled:
            return versions
        if not self._samples:
            self._samples = [_sample(p) for _, p in self._parameters]
        return list(zip(versions, [str(x) for x in _lists(self._samples)], strict=True))  # as text NaN equals itself


def _sample(p: Tensor) -> Tensor:
    """A few elements, as a view."""
    x = getattr(p.detach(), "_local_tensor", p.detach())  # a DTensor's own part
    while x.dim() > 1 and x.numel():
        x = x[-1]
    return x.reshape(-1)[:_SAMPLE]


def _lists(samples: list[Tensor]) -> list[list[Any]]:
    """The elements of each, those of one kind fetched together."""
    found: list[list[Any]] = [[] for _ in samples]
    for kind in {(x.dtype, x.device) for x in samples}:
        places = [i for i, x in enumerate(samples) if (x.dtype, x.device) == kind]
        values = torch.cat([samples[i] for i in places]).tolist()
        for i in places:
            found[i], values = values[: samples[i].numel()], values[samples[i].numel() :]
    return found


def _begins_with(present: Tensor | None, before: Tensor) -> bool:
    """Whether a buffer was replaced by a larger one that begins with it: a table of more positions."""
    if present is None or present.dim() != before.dim() or present.dtype != before.dtype:
        return False
    if any(now < then for now, then in zip(present.shape, before.shape, strict=True)):
        return False
    beginning = present[tuple(slice(n) for n in before.shape)]
    return bool(int(checksum(beginning)) == int(checksum(before)))


class CalledWith:
    """How a model was set when its loss was computed: plain attributes, modes, frozen weights, default dtype.

    What a module holds beside is not restored; where it changed a loss, the loss is compared (see `witness`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._values = [
            (module.__dict__, name, value)
            for module in model.modules()
            for name, value in attributes(module)
            if is_plain_value(value) and name in module.__dict__
        ]
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self._dtype = torch.get_default_dtype()

    @contextmanager
    def restored(self) -> Generator[None]:
        """Within the block the model is set as it was; then as it is now."""
        missing = object()
        values = [
            (own, name, now, then)
            for own, name, then in self._values
            if (now := own.get(name, missing)) is not then and (type(now) is not type(then) or now != then)
        ]
        thawed = [p for p in self._frozen if p.requires_grad]
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(self._dtype)
            for own, name, _, then in values:
                own[name] = then
            for p in thawed:
                p.requires_grad_(False)
            yield
        finally:
            for p in thawed:
                p.requires_grad_(True)
            for own, name, now, _ in values:
                if now is missing:
                    own.pop(name, None)
                else:
                    own[name] = now
            torch.set_default_dtype(dtype)


def refuse_by_options(model: nn.Module, takes_gradient: Callable[[Tensor], bool]) -> set[int]:
    """Refuse what cannot be exact in chunks, by the options of torch's embeddings.

    Returns:
        The ids of the tables that are renormalised on the way (`max_norm`) and used by one layer alone.
    """
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():  # pyright: ignore[reportPrivateUsage]
            if p is not None:
                users.setdefault(id(p), []).append(f"{path}.{name}" if path else name)
    renormalised: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.scale_grad_by_freq and takes_gradient(module.weight):
            raise counted_by_frequency(path)
        if module.max_norm is not None:
            names = users[id(module.weight)]
            if len(names) > 1:
                raise ModelError(
                    f"{path} renormalises its table on the way (max_norm), and the table is also {', '.join(names)}: "
                    "chunks would use other weights than the chunks after them. Untie it, or renormalise between calls"
                )
            renormalised.add(id(module.weight))
    return renormalised


def counted_by_frequency(where: str) -> ModelError:
    """`scale_grad_by_freq` counts a token within the chunk, not within the sequence."""
    return ModelError(
        f"{where}: scale_grad_by_freq divides a token's gradient by how often it occurs in the chunk, so the sum over "
        "the chunks is not the gradient of the whole. Turn it off"
    )
