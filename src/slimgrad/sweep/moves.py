"""A schedule's actions over a sequence, in order: looked ahead in, entered in the middle, made finer on the way.

The end of the sequence is part of it: where the state after the last chunk is wanted, that chunk is advanced like any
other, and then reversed. What is held is a position, and not the actions: a hundred thousand chunks cost nothing.

A chunk that does not fit into memory is taken in parts. Where it fails in the first sweep, the sequence is cut finer
there for good: both sweeps see the parts, and bits are compared as ever. Where a chunk went forward in one piece and
fails in the reverse sweep, its parts have other shapes than it had, and so other bits: see `Move.finer`. So has
whatever is made of one that is advanced again in parts, until a state that was kept in the first sweep is loaded.

A tape (`Schedule.tape`) is a stretch of chunks at the end, which are run once, their graphs kept, and reversed from
these. Before it begins the whole state is kept, and put back when it is used up: nothing of it is rolled back. Graphs
are no part of the value: from a saved position, its chunks are run once more. Where it does not fit into memory, they
are scheduled like all others.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from slimgrad.sweep.cut import Cut, Span
from slimgrad.sweep.schedules.base import Action, Kind, Schedule

FLOOR = 16  # tokens: fewer are not taken apart


class Move(NamedTuple):
    """One action, with its span in place of a chunk's number.

    Attributes:
        kind: what to do. REVERSE may find the state before the span, or after it where it can go back.
        span: with which chunk, or part of one.
        slot: of kept states. Those of parts are below -1, by their position.
        finer: it is a part of a chunk that went forward whole. Its bits are not compared. STORE: whole states are kept.
    """

    kind: Kind
    span: Span
    slot: int = -1
    finer: bool = False


class Moves:
    """What is still to do.

    Args:
        cut: the chunks.
        schedule: None for a forward sweep alone.
        to_end: advance the last chunk too, for the state after it.
    """

    def __init__(self, cut: Cut, schedule: Schedule | None, *, to_end: bool) -> None:
        self.cut, self.schedule, self.to_end = cut, schedule, to_end
        self.reached = 0  # how far the first sweep has come
        self.parts = 1  # in how many parts chunks are taken that have not gone forward yet, or were found too large
        self.draws = False  # whether the model draws random numbers: in parts of a whole chunk it would draw others
        self.again_in_parts = False  # whether chunks that are advanced again are taken in parts: with other bits
        self._edges: list[int] = []  # where the first sweep cut within chunks
        self._turned = False  # whether the reverse sweep has begun
        self._taped: list[Span] = []  # of which graphs are kept
        self._taken = 0
        self._actions = self._all_actions()
        self._coming: deque[Move] = deque()

    @property
    def num_slots(self) -> int:
        """How many slots are used at most, but for those of parts."""
        if self.schedule is None:
            return 0
        return self._tape_slot + 1 if self._tape else self.schedule.num_slots(len(self.cut))

    @property
    def _tape(self) -> int:
        """How many chunks are on the tape."""
        return 0 if self.schedule is None else min(self.schedule.tape, len(self.cut))

    @property
    def _tape_slot(self) -> int:
        """Where the state before the tape is kept: beyond the slots of what comes before it."""
        swept = len(self.cut) - self._tape
        return self.schedule.num_slots(swept) + 1 if self.schedule is not None and swept else 0

    @property
    def is_forward(self) -> bool:
        """Whether the next action belongs to the first sweep."""
        self._look_at_first()
        return not self._turned and bool(self._coming) and self._coming[0].kind is not Kind.REVERSE

    def next(self) -> Move | None:
        """The next action; it stays the next one until it is `done`."""
        self._look_at_first()
        while self._coming:
            self._turned = self._turned or self._coming[0].kind is Kind.REVERSE
            parts = self._in_parts(self._coming[0])
            if not parts:
                return self._coming[0]
            self._put_first(parts)
        return None

    def ahead(self, count: int) -> list[Move]:
        """The next few actions, as far as they are known now."""
        self._look(count)
        return [self._coming[i] for i in range(min(count, len(self._coming)))]

    def done(self) -> None:
        """The next action has been carried out."""
        move = self._coming.popleft()
        if move.kind in (Kind.ADVANCE, Kind.TAPE, Kind.REVERSE):
            self.reached = max(self.reached, move.span.stop)
        if move.kind is Kind.TAPE:
            self._taped.append(move.span)
        elif self._is_taped(move):
            self._taped.pop()

    def _is_taped(self, move: Move) -> bool:
        return move.kind is Kind.REVERSE and bool(self._taped) and self._taped[-1] == move.span

    def split(self) -> bool:
        """Take the next action, which did not fit into memory, in two parts. False where it cannot be."""
        move = self._coming[0]
        if move.kind is Kind.TAPE or self._is_taped(move):
            self._leave_tape()
            return True
        length = move.span.stop - move.span.start
        is_again = move.kind is Kind.ADVANCE and move.span.stop <= self.reached
        if length < 2 * FLOOR or move.kind is Kind.RETRACE:
            return False
        self.parts = max(self.parts, -(-self.cut.chunk * 2 // length))
        self.again_in_parts = self.again_in_parts or (is_again and not move.finer)
        if not move.finer:
            return True  # `next` sees to it
        parts = move.span.pieces(2)
        if move.kind is Kind.ADVANCE:
            self._put_first([Move(Kind.ADVANCE, part, finer=True) for part in parts])
        else:
            self._put_first(_from_before(parts, finer=True))
        return True

    def state(self) -> dict[str, Any]:
        """Where it stands."""
        return {
            "taken": self._taken,
            "coming": [[int(s.kind), *s.span, s.slot, s.finer] for s in (*self._tape_again(), *self._coming)],
            "edges": list(self._edges),
            "turned": self._turned,
            "reached": self.reached,
            "parts": self.parts,
            "draws": self.draws,
            "again in parts": self.again_in_parts,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Stand there."""
        self._taken, self._edges, self._turned = state["taken"], list(state["edges"]), state["turned"]
        self.reached, self.parts, self.draws = state["reached"], state["parts"], state["draws"]
        self.again_in_parts = state["again in parts"]
        self._taped = []
        self._actions = self._all_actions()
        for _ in range(self._taken):
            next(self._actions)
        self._coming = deque(Move(Kind(k), Span(start, stop), slot, f) for k, start, stop, slot, f in state["coming"])

    def _all_actions(self) -> Iterator[Action]:
        count, swept = len(self.cut), len(self.cut) - self._tape
        if self.schedule is None:
            return (Action(Kind.ADVANCE, chunk) for chunk in range(count))
        if not self._tape:
            return self._scheduled(self.schedule, 0, count, 0, to_end=self.to_end)
        if not swept:
            return self._taping(0, count)
        return self._scheduled(self.schedule, 0, swept, 0, to_end=True, then=self._taping(swept, count))

    @staticmethod
    def _scheduled(
        schedule: Schedule, first: int, count: int, slot: int, *, to_end: bool, then: Iterable[Action] = ()
    ) -> Iterator[Action]:
        """A schedule's actions over chunks from `first` on, in slots from `slot` on; `then`: between its two sweeps."""
        for action in schedule.actions(count):
            kind, chunk, own, whole = action
            moved = Action(kind, first + chunk, slot + own, whole)
            if kind is Kind.REVERSE and to_end:
                last, beyond, to_end = first + count - 1, slot + schedule.num_slots(count), False
                yield Action(Kind.STORE, last, beyond)
                yield Action(Kind.ADVANCE, last)
                yield from then
                yield Action(Kind.LOAD, last, beyond)
                yield moved
                yield Action(Kind.FREE, last, beyond)
            else:
                yield moved

    def _taping(self, first: int, count: int) -> Iterator[Action]:
        yield Action(Kind.STORE, first, self._tape_slot, whole=True)
        yield from (Action(Kind.TAPE, chunk) for chunk in range(first, count))
        yield from (Action(Kind.REVERSE, chunk) for chunk in range(count - 1, first - 1, -1))
        yield Action(Kind.LOAD, first, self._tape_slot)
        yield Action(Kind.FREE, first, self._tape_slot)

    def _tape_again(self) -> list[Move]:
        """What brings back the graphs that are kept now."""
        if not self._taped:
            return []
        return [Move(Kind.LOAD, self._taped[0], self._tape_slot), *(Move(Kind.TAPE, span) for span in self._taped)]

    def _leave_tape(self) -> None:
        """Schedule the chunks on the tape that are not reversed yet like all others, from the state before them."""
        assert self.schedule is not None
        count, taped, slot = 0, bool(self._taped), self._tape_slot
        while (self._coming[0].kind, self._coming[0].slot) != (Kind.LOAD, slot):
            count += self._coming.popleft().kind is Kind.REVERSE  # each is reversed once
            self._look(1)
        self._taped, first = [], len(self.cut) - self._tape
        to_end = self.to_end and not self._turned
        again = self._scheduled(self.schedule, first, count, slot + 1, to_end=to_end)
        moves = [self._move(action) for action in again]
        self._coming.extendleft(reversed([self._coming[0], *moves] if taped else moves))

    def _look(self, count: int) -> None:
        while len(self._coming) < count and (action := next(self._actions, None)) is not None:
            self._taken += 1
            self._coming.append(self._move(action))

    def _look_at_first(self) -> None:
        self._look(1)
        if self.parts > 1 and self._coming and self._coming[0].kind is Kind.TAPE:  # memory is short
            self._leave_tape()

    def _move(self, action: Action) -> Move:
        return Move(action.kind, self.cut[action.chunk], action.slot, finer=action.whole)

    def _put_first(self, moves: list[Move]) -> None:
        self._coming.popleft()
        self._coming.extendleft(reversed(moves))

    def _in_parts(self, move: Move) -> list[Move]:
        """What takes the place of a move over a whole chunk, if it is to be taken in parts."""
        never = self.parts == 1 and not self._edges
        if never or move.kind not in (Kind.ADVANCE, Kind.REVERSE) or move.finer:
            return []
        span, is_new = move.span, move.span.stop > self.reached
        inside = self._edges[bisect_right(self._edges, span.start) : bisect_left(self._edges, span.stop)]
        count = 1 if self.parts == 1 else (span.stop - span.start) // max(FLOOR, self.cut.chunk // self.parts)
        if self.again_in_parts and move.kind is Kind.ADVANCE and not is_new and count > 1:
            return [Move(Kind.ADVANCE, part, finer=True) for part in span.pieces(count)]
        if is_new and not inside and count > 1:
            inside = [part.stop for part in span.pieces(count)[:-1]]
            for edge in inside:
                insort(self._edges, edge)
        if inside:
            parts = [Span(*edge) for edge in pairwise([span.start, *inside, span.stop])]
            return self._as_the_first_sweep(move.kind, parts, is_new=is_new)
        if move.kind is Kind.REVERSE and count > 1 and not self.draws:
            rolls_back = self.schedule is not None and self.schedule.rolls_back
            back = [Move(Kind.RETRACE, span)] if rolls_back else []
            return [*back, *_from_before(span.pieces(count), finer=True)]
        return []

    def _as_the_first_sweep(self, kind: Kind, parts: list[Span], *, is_new: bool) -> list[Move]:
        rolls_back = self.schedule is not None and self.schedule.rolls_back
        if kind is Kind.ADVANCE:
            moves = [[_store(part), Move(Kind.ADVANCE, part)] for part in parts]
            return [move for pair in moves for move in (pair if rolls_back else pair[1:])]
        if is_new or not rolls_back:
            return _from_before(parts, finer=False)
        moves = [[_load(part), Move(Kind.REVERSE, part), _free(part)] for part in reversed(parts)]
        return [move for three in moves for move in three]


def _from_before(parts: list[Span], *, finer: bool) -> list[Move]:
    """Reverse a chunk in parts, from the state before it."""
    moves: list[Move] = []
    for part in parts[:-1]:
        moves += [_store(part, finer), Move(Kind.ADVANCE, part, finer=finer)]
    moves.append(Move(Kind.REVERSE, parts[-1], finer=finer))
    for part in reversed(parts[:-1]):
        moves += [_load(part), Move(Kind.REVERSE, part, finer=finer), _free(part)]
    return moves


def _store(part: Span, finer: bool = False) -> Move:
    return Move(Kind.STORE, part, -2 - part.start, finer)


def _load(part: Span) -> Move:
    return Move(Kind.LOAD, part, -2 - part.start)


def _free(part: Span) -> Move:
    return Move(Kind.FREE, part, -2 - part.start)
