"""Where one sequence's inputs and targets come from, span by span: tensors in memory, mapped files, or a reader.

A sweep asks for each span when it reaches it, so nothing of a sequence need be in memory beyond the span that is being
worked on. A mapped file is a tensor like any other (`torch.from_file`, `torch.from_numpy(np.memmap(...))`): slicing it
reads what is used. For everything else there is `Reader`.

Both sweeps must see the same numbers: `SequenceData.checksums` gives 64 bits per tensor to record and compare. What a
reader gives is also copied into contiguous memory of our own, since it may reuse its buffer, and since some kernels
choose their order of addition by strides and alignment. Cost: one copy of the span.
"""

from __future__ import annotations

import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from slimgrad.call.losses import IGNORED, count_targets, is_counted
from slimgrad.errors import InputError
from slimgrad.states.checksum import checksum
from slimgrad.sweep import tree


@runtime_checkable
class Reader(Protocol):
    """A sequence that is read by spans, in place of tensors: inputs or targets of any length.

    ```python
    class Squares:
        length, batch = 10**8, 1

        def read(self, start, stop):
            return torch.arange(start, stop)[None].square() % 256
    ```

    It is asked in any order, by one thread at a time, and more than once for one span: then it must give the same
    again. It may return a view of a buffer that its next read fills anew. With `targets=None` it is asked for the
    tokens that follow as well, `read(start, min(stop + 1, length))`. Tensors that require gradients are passed whole.
    """

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        ...

    @property
    def batch(self) -> int:
        """Sequences side by side."""
        ...

    def read(self, start: int, stop: int) -> tree.Tree:
        """Tokens `start` up to, not including, `stop`; 0 <= start < stop <= length.

        Returns:
            A tensor `[batch, stop - start, ...]`, or a pytree of them, on any device, without gradients. Tree, dtypes
            and trailing axes are those of the first read each time; else the call raises `InputError`, and for other
            values of a span that was read before `ConsumedError`.
        """
        ...


class Piece(NamedTuple):
    """One span of a sequence, on the model's device. `targets` is None where none were asked for."""

    inputs: tree.Tree
    targets: tree.Tree | None


class SequenceData:
    """The inputs of one sequence and its targets.

    Args:
        inputs: a tensor `[batch, time, ...]` or `[time]` (a batch of one), a pytree of them, or a `Reader`.
        targets: likewise, or None for next-token prediction.
        device: where pieces are wanted.
        has_targets: False where there is nothing to predict; then `targets` is None, and the inputs may be anything.

    Attributes:
        inputs: the source of the inputs.
        targets: that of the targets that were passed, or None.
        batch, time: of both.

    Raises:
        InputError: what was passed does not fit. What a reader gives is looked at when it is read.
    """

    def __init__(self, inputs: Any, targets: Any, device: torch.device, *, has_targets: bool = True) -> None:
        self.inputs = source_of(inputs, "inputs", device)
        self.targets = None if targets is None else source_of(targets, "targets", device)
        self.batch, self.time = self.inputs.batch, self.inputs.time
        if self.batch < 1 or self.time < 1:
            raise InputError(
                f"expected at least one sequence and one token, got batch {self.batch} and time {self.time}"
            )
        if self.targets is None:
            if has_targets and self.inputs.whole is not None:
                _require_tokens(self.inputs.whole)
        elif (self.targets.batch, self.targets.time) != (self.batch, self.time):
            raise InputError(
                f"targets must have the inputs' batch and time ({self.batch}, {self.time}), got "
                f"({self.targets.batch}, {self.targets.time}): one target for each step. For one label per sequence "
                "write it at the step that should predict it and -100 at all others; for regression pass a dict of "
                "targets and a mask, both [batch, time, ...], with a loss_fn that uses the mask and normalizer= the "
                "number of steps that count"
            )

    def read(self, start: int, stop: int, *, targets: bool) -> Piece:
        """Tokens `start` up to, not including, `stop`; with `targets`, what goes with them."""
        assert 0 <= start < stop <= self.time
        if not targets:
            return Piece(self.inputs.read(start, stop), None)
        if self.targets is not None:
            return Piece(self.inputs.read(start, stop), self.targets.read(start, stop))
        tokens, following = self.inputs.read_with_next(start, stop)
        following = following.long()
        if stop == self.time:  # the last token has no target
            following = torch.cat([following, following.new_full((self.batch, 1), IGNORED)], dim=1)
        return Piece(tokens, following)

    def count(self) -> int | None:
        """How many targets are not ignored; None where only reading tells. Reads all targets that are in memory."""
        if self.targets is None:
            return self.batch * (self.time - 1)
        if self.targets.whole is None:
            return None
        return count_targets(self.targets.whole, self.batch, self.time)

    def count_in(self, targets: tree.Tree) -> Tensor:
        """How many targets of one span are not ignored: 0-d int64, without synchronising. Spans add up to `count`."""
        if isinstance(targets, Tensor) and _is_integer(targets):
            return is_counted(targets).sum()
        first = targets if self.targets is None else self.targets.flatten(targets)[0]
        return torch.full((), first.shape[0] * first.shape[1], dtype=torch.int64, device=first.device)

    def checksums(self, piece: Piece) -> dict[str, Tensor]:
        """By name ("inputs", "inputs ['x']", "targets"), 64 bits that tell one piece from another, as 0-d int64.

        Without synchronising. Two passes over the piece.
        """
        found = self.inputs.checksums(piece.inputs)
        if piece.targets is None:
            return found
        if self.targets is None:
            return found | {"targets": checksum(piece.targets)}
        return found | self.targets.checksums(piece.targets)


def source_of(given: Any, name: str, device: torch.device) -> Source:
    """What was passed as `name` ("inputs", "targets"), to be read by spans.

    Args:
        given: a tensor `[batch, time, ...]` or `[time]`, a pytree of them, or a `Reader`.
        name: as errors should call it.
        device: where pieces are wanted.
    """
    if isinstance(given, PackedSequence):
        raise InputError(
            f"{name}: expected a tensor [batch, time, ...], got a PackedSequence, whose steps of several sequences lie "
            "in one row. Pass a list of tensors (torch.nn.utils.rnn.unpack_sequence), or pad on the right"
        )
    return _Streamed(given, name, device) if isinstance(given, Reader) else _Whole(given, name, device)


class Source(ABC):
    """Inputs or targets of one sequence, by spans.

    Attributes:
        batch, time: of the sequence.
        whole: the tree of tensors `[batch, time, ...]` in memory; None for a reader.
        grad_positions: which of the leaves require gradients.
    """

    whole: tree.Tree | None = None
    grad_positions: Sequence[int] = ()
    batch: int
    time: int
    _form: _Form | None = None

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device = name, device

    @abstractmethod
    def read(self, start: int, stop: int) -> tree.Tree:
        """The tree of tensors `[batch, stop - start, ...]`, on the device."""

    @abstractmethod
    def read_with_next(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens `[batch, stop - start]`, and the one after each; one fewer at the end of the sequence."""

    def flatten(self, piece: tree.Tree) -> list[Tensor]:
        """The leaves of a piece (or of `whole`), in the order of `grad_positions`."""
        assert self._form is not None
        return tree.flatten_like(piece, self._form.skeleton)

    def unflatten(self, leaves: Sequence[Any]) -> tree.Tree:
        """A tree again, of a piece's leaves or of whatever stands for them."""
        assert self._form is not None
        return tree.unflatten(leaves, self._form.spec)

    def checksums(self, piece: tree.Tree) -> dict[str, Tensor]:
        """See `SequenceData.checksums`."""
        assert self._form is not None
        return {
            name: checksum(leaf.resolve_neg())  # bits can be viewed as integers only where no sign is pending
            for name, leaf in zip(self._form.names, self.flatten(piece), strict=True)
        }


class _Form:
    """How a tree is built, and what errors call its leaves."""

    def __init__(self, name: str, given: tree.Tree) -> None:
        leaves, self.spec = tree.flatten(given)
        self.skeleton = tree.skeleton(self.spec)
        is_leaf = len(leaves) == 1 and leaves[0] is given
        self.names = [name] if is_leaf else [f"{name} {path}" for path in tree.paths(given)]


class _Whole(Source):
    """Tensors in memory, or mapped files."""

    def __init__(self, given: Any, name: str, device: torch.device) -> None:
        super().__init__(name, device)
        self._form = _Form(name, given)
        for leaf_name, leaf in zip(self._form.names, tree.leaves(given), strict=True):
            _require_dense(leaf, leaf_name)
        # 1-D tensors stand for a batch of one
        self.whole = tree.map_tensors(lambda x: x[None] if x.dim() == 1 else x, given)
        self._leaves = tree.leaves(self.whole)
        self.batch, self.time = _batch_and_time(self._leaves, name)
        # a copy from pinned memory may still be under way when a call returns, and its owner fill the buffer anew
        self._waits = [x.is_pinned() for x in self._leaves]
        self.grad_positions = [position for position, x in enumerate(self._leaves) if x.requires_grad]

    def read(self, start: int, stop: int) -> tree.Tree:
        pairs = zip(self._leaves, self._waits, strict=True)
        return self.unflatten([x[:, start:stop].to(self._device, non_blocking=not waits) for x, waits in pairs])

    def read_with_next(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        # two slices, so that the tokens have the strides that `read` gives them
        return self.read(start, stop), self.read(start + 1, stop + 1)


class _Streamed(Source):
    """What a reader gives, checked at every read."""

    def __init__(self, reader: Reader, name: str, device: torch.device) -> None:
        super().__init__(name, device)
        try:
            self.batch, self.time = _whole_number(reader.batch), _whole_number(reader.length)
        except TypeError:
            raise InputError(
                f"{name}: expected a reader whose batch and length are whole numbers, got "
                f"batch={reader.batch!r} and length={reader.length!r}. Make them attributes or properties"
            ) from None
        self._reader, self._lock = reader, _lock_of(reader)
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []  # of the first read: dtype and trailing axes by leaf

    def read(self, start: int, stop: int) -> tree.Tree:
        with self._lock:
            leaves = self._checked(self._reader.read(start, stop), start, stop)
            # ours before the next read, also where a copy from pinned memory to the device would still be under way
            copies = [x.clone(memory_format=torch.contiguous_format) for x in leaves]
        return self.unflatten([x.to(self._device, non_blocking=True) for x in copies])

    def read_with_next(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        last = min(stop + 1, self.time)
        tokens = _require_tokens(self.read(start, last), f"{self._name}: read({start}, {last}) gave something else; ")
        # contiguous, as `read` gives them
        return tokens[:, : stop - start].contiguous(), tokens[:, 1:]

    def _checked(self, given: tree.Tree, start: int, stop: int) -> list[Tensor]:
        """The leaves of what the reader gave."""
        form = self._form or _Form(self._name, given)
        asked = f"read({start}, {stop})"
        try:
            leaves = tree.flatten_like(given, form.skeleton)
        except ValueError as error:
            raise InputError(
                f"{self._name}: {asked}: {error}. A reader must give the same tree at every read as at its first"
            ) from None
        if not leaves:
            raise InputError(f"{self._name}: {asked}: expected a tensor or a tree of tensors, got nothing")
        for name, leaf in zip(form.names, leaves, strict=True):
            self._require_piece(leaf, stop - start, f"{name}: {asked}")
        kinds = [(leaf.dtype, leaf.shape[2:]) for leaf in leaves]
        for name, kind, first in zip(form.names, kinds, self._kinds or kinds, strict=True):
            if kind != first:
                raise InputError(
                    f"{name}: {asked}: expected {_described(first)}, as in the first read, got {_described(kind)}. A "
                    "reader must give the same dtypes and trailing axes at every read"
                )
        self._form, self._kinds = form, kinds
        return leaves

    def _require_piece(self, leaf: Any, tokens: int, where: str) -> None:
        expected = f"expected a tensor [{self.batch}, {tokens}, ...] (batch, stop - start, ...)"
        if not isinstance(leaf, Tensor):
            raise InputError(f"{where}: {expected}, got a {type(leaf).__name__}. For NumPy arrays use torch.from_numpy")
        _require_dense(leaf, where)
        if leaf.shape[:2] != (self.batch, tokens):
            raise InputError(
                f"{where}: {expected}, got {list(leaf.shape)}. Give every sequence of the batch, its axis also where "
                "it is one, and exactly the tokens that were asked for"
            )
        if leaf.requires_grad:
            raise InputError(
                f"{where}: got a tensor that requires gradients, which nobody would receive; expected constants. "
                "Detach it, or pass tensors that require gradients whole, in place of a reader"
            )


# by id: one for all sources of a reader, in whichever call. A source holds both, so a lock does not outlive its reader
_locks: WeakValueDictionary[int, threading.RLock] = WeakValueDictionary()
_registering = threading.Lock()


def _lock_of(reader: Reader) -> threading.RLock:
    with _registering:
        return _locks.setdefault(id(reader), threading.RLock())


def _whole_number(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _described(kind: tuple[torch.dtype, torch.Size]) -> str:
    dtype, trailing = kind
    return f"{dtype} [{', '.join(['batch', 'tokens', *map(str, trailing)])}]"


def _is_integer(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex()


def _require_tokens(inputs: tree.Tree, found: str = "") -> Tensor:
    """The inputs, if they can be their own targets one step later. `found` begins the error."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or not _is_integer(inputs):
        raise InputError(f"{found}targets=None means next-token prediction, which needs integer inputs [batch, time]")
    return inputs


def _require_dense(leaf: Any, where: str) -> None:
    """Refuse tensors that cannot be cut along the axis of time."""
    if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout != torch.strided):
        kind = "nested" if leaf.is_nested else str(leaf.layout)
        raise InputError(
            f"{where}: expected a dense tensor [batch, time, ...], got a {kind} one. Pass sequences of different "
            "lengths as a list of tensors; make a sparse tensor dense with .to_dense()"
        )


def _batch_and_time(leaves: Sequence[Any], name: str) -> tuple[int, int]:
    """The first two axes, which all tensors share."""
    shapes = {tuple(leaf.shape[:2]) if isinstance(leaf, Tensor) else () for leaf in leaves}
    shape = cast("tuple[int, ...]", next(iter(shapes)) if len(shapes) == 1 else ())
    if len(shape) != 2:
        described = ", ".join(
            f"a tensor {list(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            for leaf in leaves
        )
        raise InputError(
            f"{name}: expected tensors [batch, time, ...] with the same batch and time, got {described or 'nothing'}. "
            "For NumPy arrays use torch.from_numpy; what is read by spans is one slimgrad.Reader: length, batch and "
            "read(start, stop)"
        )
    return shape[0], shape[1]
