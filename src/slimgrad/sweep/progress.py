"""A gradient in progress, as a value: all that it is between two of its moves.

    Progress = seed · moves (the cut, and where in them) · per leaf of the state: value, log, adjoint, kept copies
               · recorded bits · gathered gradients · sums of losses and metrics · gradients of inputs

So it can be looked at, saved, loaded and sent elsewhere. What runs it is `run.Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from slimgrad.errors import ModelError, SweepError
from slimgrad.gradients.escaped import refuse_escaped
from slimgrad.states import carrier_for
from slimgrad.states.base import Carrier, Purpose, Root, Setting, State, mismatch
from slimgrad.states.tensors import own
from slimgrad.states.values import packed_value, unpacked_value
from slimgrad.sweep import tree
from slimgrad.sweep.moves import Move, Moves
from slimgrad.sweep.schedules.base import Kind
from slimgrad.sweep.store import Store
from slimgrad.sweep.witness import Witness, fetch


class Saved(Protocol):
    """A part of a progress that others own: gathered gradients, sums of losses."""

    def state(self) -> Any:
        """Tensors, numbers and the like, in dicts and lists."""
        ...

    def load_state(self, state: Any) -> None:
        """Go on from there."""
        ...


class Progress:
    """One gradient under way.

    Args:
        initial_state: the state before the first chunk.
        moves: what is still to be done.
        seed: from which every chunk's own is derived.
        parts: what others own of it, by name.
        plan: why it is cut and scheduled so, in plain values, for whoever goes on with it.
    """

    def __init__(
        self,
        initial_state: tree.Tree,
        moves: Moves,
        *,
        seed: int,
        parts: Mapping[str, Saved],
        plan: dict[str, Any] | None = None,
    ) -> None:
        self.moves, self.seed, self.parts, self.plan = moves, seed, parts, plan
        schedule, count = moves.schedule, len(moves.cut)
        leaves, self.spec = tree.flatten(initial_state)
        self.skeleton = tree.skeleton(self.spec)
        # beside these slots there are one for the end, and those that parts of chunks take
        self.store = Store("device" if schedule is None else schedule.store, moves.num_slots)
        self.rows = Store("device" if schedule is None else schedule.rows)
        self.carriers: list[Carrier] = [
            carrier_for(leaf, Setting(index, name, schedule is not None and schedule.rolls_back, count, self.rows))
            for index, (leaf, name) in enumerate(zip(leaves, tree.paths(initial_state), strict=True))
        ]
        if schedule is not None and schedule.tape:
            refuse_untapeable(self.carriers)
        self.slots: dict[int, tuple[int, bool, list[Any]]] = {}  # position, same_bits, and a token for each leaf
        self.same_bits = True  # the live state is the first sweep's in every bit, not one of finer moves
        self.witness = Witness()
        self.final_state: tree.Tree = None
        self.final_gradient: Sequence[Tensor | None] = [None] * len(self.carriers)
        self.phase = "new"

    @property
    def held_bytes(self) -> int:
        """Bytes of kept states, live state and adjoint."""
        return self.store.nbytes + sum(carrier.nbytes for carrier in self.carriers)

    def use_slot(self, move: Move) -> None:
        """Keep the live state in a slot, make a kept one the live one, or forget it."""
        if move.kind is Kind.STORE:
            tokens = [carrier.keep(self.store, whole=move.finer) for carrier in self.carriers]
            self._drop(move.slot)  # a part of a part may begin where that one does
            if any(token is not None for token in tokens):
                self.slots[move.slot] = move.span.start, self.same_bits, tokens
        elif move.kind is Kind.FREE:
            self._drop(move.slot)
        else:
            position, self.same_bits, tokens = self.slots.get(move.slot, (0, self.same_bits, []))
            for carrier, token in zip(self.carriers, tokens, strict=False):
                if token is not None:
                    carrier.load(self.store, token, position)

    def _drop(self, slot: int) -> None:
        *_, tokens = self.slots.pop(slot, (0, True, []))
        for carrier, token in zip(self.carriers, tokens, strict=False):
            if token is not None:
                carrier.drop(self.store, token)

    def fetch_ahead(self) -> None:
        """Have what will be loaded next read beside the computation."""
        if not self.store.is_file:
            return
        for move in self.moves.ahead(4):
            if move.kind is Kind.LOAD and move.slot in self.slots:
                for carrier, token in zip(self.carriers, self.slots[move.slot][-1], strict=True):
                    if token is not None:
                        carrier.fetch(self.store, token)

    def bind(self, move: Move, purpose: Purpose) -> tree.Tree:
        """The state to hand to the model for a chunk."""
        bound = [carrier.bind(move.span, purpose, finer=move.finer) for carrier in self.carriers]
        return tree.unflatten(bound, self.spec)

    def take(self, state: tree.Tree) -> None:
        """Receive the state that the model returned."""
        try:
            leaves = tree.flatten_like(state, self.skeleton)
        except ValueError as error:
            raise ModelError(
                f"the model returned a state of another structure than it was given: {error}. "
                "forward and advance must return the state with the same keys, in the same containers"
            ) from None
        for carrier, leaf in zip(self.carriers, leaves, strict=True):
            carrier.take(leaf)

    def compare(self, move: Move, read: dict[str, Tensor], outputs: Sequence[Tensor], *, bits: bool = True) -> None:
        """Note the bits of what a chunk read and came to, or compare them: in one synchronisation.

        Without `bits`, for a finer move, and for what came of one, look at what exact sums must know alone.
        """
        compared = bits and not move.finer and self.same_bits
        read, outputs, carriers = (read, outputs, self.carriers) if compared else ({}, (), [])
        checksums = [carrier.checksum() for carrier in carriers]
        loss = self.witness.of_loss(outputs)
        found = iter(fetch([*read.values(), *(c.look() for c in self.carriers), *checksums, *loss]))
        for name in read:  # first: what came of other inputs is other as well
            self.witness.compare_read(name, move.span, next(found))
        looked = [(carrier, next(found)) for carrier in self.carriers]
        changed = [number is not None and carrier.seen(number) for carrier, number in looked]
        for carrier, moved in zip(carriers, changed, strict=False):
            number = next(found)
            (number,) = fetch([carrier.checksum()]) if moved else (number,)
            if not self.witness.agrees(f"state {carrier.name}", carrier.checked, number):
                raise mismatch(carrier.name, move.span)
        self.witness.compare_loss(move.span, list(found))

    def roots(self) -> list[Root]:
        """Where the adjoint enters the chunk's graph, which is gone through next."""
        for carrier in self.carriers:
            carrier.enter_backward()
        return [root for carrier in self.carriers for root in carrier.roots()]

    def sources(self) -> list[Tensor]:
        """The leaves of the chunk's graph that stand for the state before it."""
        return [source for carrier in self.carriers for source in carrier.sources()]

    def settle(self, leaves: Sequence[Tensor]) -> None:
        """The chunk is over: whatever still holds on to its graph may not go back through it."""
        for leaf in (*leaves, *self.sources()):
            leaf.register_hook(refuse_escaped)
        for carrier in self.carriers:
            carrier.settle()
            carrier.in_backward = False

    def put_aside(self) -> list[dict[str, Any]]:
        """The chunk's graph stays on a tape: stand after it. Returns what `take_up` wants."""
        return [carrier.put_aside() for carrier in self.carriers]

    def take_up(self, aside: Sequence[dict[str, Any]]) -> None:
        """A chunk's graph comes from the tape: it is as if it had just been run."""
        for carrier, of_chunk in zip(self.carriers, aside, strict=True):
            carrier.take_up(of_chunk)

    def rewind(self, move: Move) -> None:
        """The move failed: it is as if it had not been tried."""
        self.witness.forget_after(max(move.span.start, self.moves.reached))
        for carrier in self.carriers:
            carrier.rewind()
            carrier.in_backward = False

    def end(self) -> None:
        """The state after the last chunk is at hand."""
        if self.final_state is None:
            self.final_state = tree.unflatten([carrier.final() for carrier in self.carriers], self.spec)

    def expect(self, final_gradient: tree.Tree) -> None:
        """The adjoint will begin with this: the state's tree, with a tensor or None for each leaf."""
        leaves, got = tree.flatten(final_gradient)
        if got != self.spec:
            raise SweepError(
                f"a state's gradient has another structure than the state; expected {self.spec}, got {got}"
            )
        for carrier, leaf in zip(self.carriers, leaves, strict=True):
            if not (leaf is None or isinstance(leaf, Tensor)):
                raise SweepError(
                    f"the gradient of state {carrier.name}: expected a tensor or None, got {type(leaf).__name__}"
                )
        if self.final_state is not None:
            self._require_shapes_of_final(leaves)
        self.final_gradient = leaves

    def enter_final_gradient(self) -> None:
        """The adjoint begins, now that the final state and its shapes are known."""
        self._require_shapes_of_final(self.final_gradient)
        for carrier, gradient in zip(self.carriers, self.final_gradient, strict=True):
            carrier.set_adjoint(gradient)

    def _require_shapes_of_final(self, gradients: Sequence[Tensor | None]) -> None:
        leaves = tree.flatten_like(self.final_state, self.skeleton)  # a tuple may have come where None was
        for carrier, gradient, leaf in zip(self.carriers, gradients, leaves, strict=True):
            expected = getattr(leaf.value if isinstance(leaf, State) else leaf, "shape", None)
            if gradient is not None and expected is not None and gradient.shape != expected:
                raise SweepError(
                    f"the gradient of state {carrier.name}: expected the final state's shape {list(expected)}, "
                    f"got {list(gradient.shape)}"
                )

    def adjoint(self) -> tree.Tree:
        """The gradient of the live state: its tree, with a tensor, or None for zeros, for each leaf.

        Tensors of their own: of rows it would be the beginning of a buffer as long as the sequence.
        """
        found = [carrier.adjoint() for carrier in self.carriers]
        return tree.unflatten([None if x is None else own(x) for x in found], self.spec)

    def adjoint_norm(self) -> float:
        """Of all leaves together."""
        found = [a for a in (carrier.adjoint() for carrier in self.carriers) if a is not None]
        norms = [a.abs().float().norm() for a in found]
        return float(torch.stack([norm.to(norms[0].device) for norm in norms]).norm()) if norms else 0.0

    def close(self) -> None:
        """Let go of states and files."""
        self.phase = "closed"
        self.slots.clear()
        self.store.close()
        self.rows.close()

    def state(self) -> dict[str, Any]:
        """All of it: tensors, numbers, plain values, in dicts, lists and tuples."""
        slots = {
            slot: [position, same, [_each(c.pack, token) for c, token in zip(self.carriers, tokens, strict=True)]]
            for slot, (position, same, tokens) in self.slots.items()
        }
        return {
            "seed": self.seed,
            "plan": self.plan,
            "phase": self.phase,
            "moves": self.moves.state(),
            "carriers": [carrier.state() for carrier in self.carriers],
            "store": self.store.state(),
            "slots": slots,
            "same bits": self.same_bits,
            "witness": self.witness.state(),
            "final state": None if self.final_state is None else self._packed(self.final_state),
            "final gradient": list(self.final_gradient),
            "parts": {name: part.state() for name, part in self.parts.items()},
        }

    def load_state(self, state: dict[str, Any], moved: Mapping[torch.device, torch.device]) -> None:
        """Go on from there. The progress must have been made for the same model, sequence and schedule.

        Args:
            state: see `state`.
            moved: where tensors of a device are now.
        """
        self.seed, self.phase, self.final_gradient = state["seed"], state["phase"], state["final gradient"]
        self.plan = state["plan"]
        self.moves.load_state(state["moves"])
        self.store.load_state(state["store"], moved)
        for carrier, saved in zip(self.carriers, state["carriers"], strict=True):
            carrier.load_state(saved)
        self.same_bits = state["same bits"]
        for slot, (position, same, tokens) in state["slots"].items():
            unpacked = [_each(c.unpack, token) for c, token in zip(self.carriers, tokens, strict=True)]
            self.slots[slot] = position, same, unpacked
        self.witness.load_state(state["witness"])
        if state["final state"] is not None:
            self.final_state = tree.unflatten([unpacked_value(leaf) for leaf in state["final state"]], self.spec)
        for name, part in self.parts.items():
            part.load_state(state["parts"][name])

    def _packed(self, state: tree.Tree) -> list[Any]:
        leaves = tree.flatten_like(state, self.skeleton)
        return [packed_value(carrier.name, leaf) for carrier, leaf in zip(self.carriers, leaves, strict=True)]


def refuse_untapeable(carriers: Sequence[Carrier]) -> None:
    """Raise if a kind of state does not say what its chunks' graphs need of it."""
    for carrier in carriers:
        if carrier.of_chunk is None:
            raise SweepError(
                f"state {carrier.name}: {type(carrier).__name__} cannot be put on a tape: expected it to name the "
                "attributes that belong to one chunk (Carrier.of_chunk). Name them, or use a schedule with tape=0"
            )


def _each(function: Callable[[Any], Any], token: Any) -> Any:
    """None stands for nothing kept."""
    return None if token is None else function(token)
