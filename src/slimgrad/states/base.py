"""What a kind of state is: what the model holds of it, and how a sweep carries it from chunk to chunk, and back.

A kind is two classes in one file. A `State` is what the model sees: an immutable leaf of its state, with a method that
moves it on. A `Carrier` is the sweep's side, one for each leaf and the length of one run. A chunk is one round of

    bind -> (the model runs) -> take -> numbers, seen -> [roots, sources, backward] -> settle

`bind` hands the model its leaf and `take` receives the one it returned. `numbers` says what must be fetched from the
device, all leaves' together, and `seen` hears it. In the reverse sweep `roots` are the tensors through which the
adjoint (the gradient of the state after the chunk) enters the chunk's graph. `settle` ends the chunk: forward the
carrier then stands after it, in the reverse sweep before it, with the adjoint of the state before. `rewind` is for a
chunk that failed: it is as if it had not run.

A carrier knows where on the time axis it stands. A chunk in the reverse sweep finds it before the chunk (kept, or
recomputed) or after it, from where only kinds that roll back can do it.

To add a kind: subclass both, and give `State.carrier`. Nothing else knows which kinds there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from slimgrad.errors import ModelError, StateMismatchError
from slimgrad.sweep.cut import Span
from slimgrad.sweep.store import Store


class Purpose(Enum):
    """What a chunk is run for."""

    FORWARD = auto()  # the first time, for the state after it
    AGAIN = auto()  # once more, from a kept state
    REVERSE = auto()  # with its graph, for its gradient
    TAPE = auto()  # the first time, with its graph, for its gradient later
    RETRACE = auto()  # without a graph, to stand before it


@dataclass(frozen=True)
class Setting:
    """What a carrier is told when it is made.

    Attributes:
        index: which leaf of the state.
        name: how people call it.
        rolls_back: whether the schedule rolls back what can be rolled back.
        growth: by what factor rows of the first chunk will have multiplied at the end, about.
        rows: allocates what grows with the sequence, where the schedule wants it.
    """

    index: int
    name: str
    rolls_back: bool
    growth: float
    rows: Store


class Root(NamedTuple):
    """A tensor of the chunk's graph (or its edge, where it may be written to since), and the cotangent at it."""

    tensor: Tensor | GradientEdge
    cotangent: Tensor


class State(ABC):
    """A leaf of a model's state that knows how to go back in time: the base of `PrefixSum`, `Growing` and your own.

    Args:
        value: a tensor, what the state has come to.
    """

    __slots__ = ("_link", "_value")

    def __init__(self, value: Tensor, *, _link: Any = None) -> None:
        self._value = value
        self._link = _link  # within a chunk of a sweep: its carrier, or what stands in for it

    @abstractmethod
    def carrier(self, setting: Setting) -> Carrier:
        """What carries this leaf through a run that begins with it."""

    @property
    def value(self) -> Tensor:
        """What the state has come to. Within a sweep only of the state that its method returned: see the kind."""
        return self._value if self._link is None else self._link.value_of(self)

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        return self._value.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the value, known at any time."""
        return self._value.dtype

    @property
    def device(self) -> torch.device:
        """Device of the value, known at any time."""
        return self._value.device

    def with_value(self, value: Tensor) -> State:
        """The same kind of state with another value."""
        return type(self)(value)

    def kept_bytes(self) -> int:
        """Bytes that a kept copy takes, where the schedule does not roll back."""
        return self._value.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.value,)


class Carrier(ABC):
    """One leaf of the state, on its way through one run.

    Attributes:
        position: where on the time axis the live state stands.
        span: of the chunk that was bound last.
        purpose: what it is run for.
        finer: it is a part of a chunk that went forward in one piece: other shapes give other bits.
        from_tape: the chunk was run with its graph in the first sweep, and is reversed from it now.
        in_backward: a call of the model now is activation checkpointing, running the chunk again.
        is_intact: nothing that the chunk's backward pass has come to is in the adjoint yet.
    """

    of_chunk: ClassVar[Sequence[str] | None] = None
    """Further attributes that belong to the chunk that was bound last, and that its graph may ask for on its way back.

    Put aside while the graph is on a tape, and taken up again. None: this kind cannot be put on a tape."""

    def __init__(self, setting: Setting) -> None:
        self.index, self.name = setting.index, setting.name
        self.position = 0
        self.span = Span(0, 0)
        self.purpose, self.finer = Purpose.FORWARD, False
        self.in_backward, self.is_intact, self.from_tape = False, True, False
        self._adjoint: Tensor | None = None

    @property
    def reverses(self) -> bool:
        """Whether the chunk is run for its gradient."""
        return self.purpose in (Purpose.REVERSE, Purpose.TAPE)

    def bind(self, span: Span, purpose: Purpose, *, finer: bool = False) -> Any:
        """The leaf to hand to the model, for a chunk."""
        self.span, self.purpose, self.finer = span, purpose, finer
        self.in_backward, self.is_intact, self.from_tape = False, True, False
        assert self.position == span.start or (self.rolls_back and self.position == span.stop)
        return self._bind()

    @property
    def rolls_back(self) -> bool:
        """Whether a chunk can be run for its gradient from the state after it."""
        return False

    @abstractmethod
    def _bind(self) -> Any: ...

    @abstractmethod
    def take(self, returned: Any) -> None:
        """Receive the leaf that the model returned."""

    @abstractmethod
    def checksum(self) -> Tensor | int:
        """64 bits of the state at `checked`: a 0-d int64 tensor, without synchronising."""

    @property
    def checked(self) -> int:
        """The position of which `checksum` speaks, once the chunk has run."""
        return self.span.stop

    def look(self) -> Tensor | None:
        """A further 0-d int64 tensor to be fetched with the checksums."""
        return None

    def seen(self, number: int) -> bool:
        """Hear what `look` asked for. Returns whether the state has other bits now than `checksum` spoke of."""
        return False

    def enter_backward(self) -> None:
        """The chunk's graph is gone through next."""
        self.in_backward = True

    def roots(self) -> list[Root]:
        """Where the adjoint enters the chunk's graph."""
        return []

    def sources(self) -> list[Tensor]:
        """The leaves of the chunk's graph that stand for the state before it."""
        return []

    def settle(self) -> None:
        """The chunk is over: forget its graph, and stand after it (reversed: before it, with that adjoint)."""
        back = self.purpose in (Purpose.REVERSE, Purpose.RETRACE) or self.from_tape
        self.position = self.span.start if back else self.span.stop
        self._settle()

    def put_aside(self) -> dict[str, Any]:
        """The chunk's graph is kept: stand after it, and hand out what belongs to the chunk."""
        aside = {name: getattr(self, name) for name in ("span", "purpose", *(self.of_chunk or ()))}
        self.settle()
        return aside

    def take_up(self, aside: dict[str, Any]) -> None:
        """The chunk that was put aside is reversed next, from its graph."""
        vars(self).update(aside)
        self.position, self.finer, self.is_intact, self.from_tape = self.span.stop, False, True, True

    @abstractmethod
    def _settle(self) -> None: ...

    @abstractmethod
    def rewind(self) -> None:
        """The chunk failed on its way forward: forget it. What has rolled back already stays before it."""

    @abstractmethod
    def keep(self, store: Store, *, whole: bool) -> Any:
        """Keep what is needed to stand here again; None if nothing is. `whole`: also what could be rolled back."""

    @abstractmethod
    def load(self, store: Store, token: Any, position: int) -> None:
        """Stand where `token` was kept, at `position`."""

    def drop(self, store: Store, token: Any) -> None:  # noqa: B027
        """Forget `token`."""

    def fetch(self, store: Store, token: Any) -> None:  # noqa: B027
        """`token` will be loaded soon."""

    def pack(self, token: Any) -> Any:
        """A token as numbers and tensors, for `state`."""
        return token

    def unpack(self, packed: Any) -> Any:
        """The token again; those that were shared are shared."""
        return packed

    @abstractmethod
    def final(self) -> Any:
        """The leaf after the chunk that has just run, free of any sweep."""

    def adjoint(self) -> Tensor | None:
        """The gradient of the live state; None stands for zeros."""
        return self._adjoint

    def set_adjoint(self, gradient: Tensor | None) -> None:
        """Put the gradient of the final state in place of the adjoint."""
        self._adjoint = gradient

    @property
    def nbytes(self) -> int:
        """Bytes held for this leaf beside what the store keeps."""
        return 0

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything between two chunks: tensors, numbers and the like, in dicts and lists."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def require_grad_mode(self, call: str) -> None:
        """Raise where a chunk that is run for its gradient is run without one."""
        if self.reverses and not torch.is_grad_enabled():
            raise ModelError(
                f"state {self.name}: {call} was called without gradients in the reverse sweep; expected them on. "
                "Remove torch.no_grad, and use torch.utils.checkpoint with use_reentrant=False"
            )

    def wrong(self, returned: Any) -> ModelError:
        """The model returned something that is not this state, moved on once."""
        return ModelError(
            f"state {self.name}: expected the object that advance/append returned, or the one the model was given "
            f"(untouched); got {returned!r}. Return exactly one of them from forward and advance"
        )


def mismatch(name: str, span: Span) -> StateMismatchError:
    """The bits of a state came out differently the second time."""
    return StateMismatchError(
        f"state {name}, {span}: rebuilt with other bits than in the forward sweep, so "
        "the gradient would not be exact. Expected the same computation twice; look for a random draw from another "
        "generator (Python's, NumPy's; on CUDA that of nn.LSTM and nn.GRU for dropout between their layers), a "
        "nondeterministic kernel (torch.use_deterministic_algorithms), `advance` computing otherwise than `forward`, "
        "or a weight, a buffer or the number of threads changed in between"
    )


def refuse_half_a_number(call: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise where a complex number would lose its imaginary part."""
    if x.is_complex() and not dtype.is_complex:
        raise ModelError(
            f"{call} was given {x.dtype} for a state of {dtype}, which would drop the imaginary part. "
            f"Begin with a state of {x.dtype}, or pass x.real"
        )
