"""The fastest way to spend a number of bytes, by what was measured: chunk, schedule and tape.

The sizes of chunks that are tried are a fifth apart, and the whole sequence in 1 to 8 chunks. For each: roll sums back
and keep plain tensors (`Rebuild`) where their copies fit, else keep as many states as fit (`Binomial`); and with what
is left, no tape or as long a one as fits. Among those within 3 % of the fastest the largest chunk wins: it makes the
fewest kernel calls, and what was measured of it extends to other machines best. Then the least memory.

Of the sequence's rows before a chunk, bytes are counted at their most, and seconds at their mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from slimgrad.budget.fit import Fit, Small
from slimgrad.budget.probe import Costs
from slimgrad.budget.size import in_megabytes
from slimgrad.sweep.cut import Cut
from slimgrad.sweep.moves import FLOOR
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.binomial import Binomial
from slimgrad.sweep.schedules.keep import Keep, Rebuild
from slimgrad.sweep.schedules.names import schedule_as_text

_NEAR = 1.03  # of the fastest
_MOST_SLOTS = 1 << 16
_LEAST = 0.4  # of the seconds that were measured, at least, without those of first touches
_UNDER_WAY = 8  # states that are on their way to a file or from it, at most


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Args:
        lengths: tokens of each sequence.
        at_once: whether all sequences' states are held at the same time (a loss whose backward comes later).
        to_end: whether the last chunk is advanced as well.
        differentiates: whether the sweep goes back.
        schedule: the one that was asked for, without regard to its tape; None: any.
        fault_seconds: for one byte that the process has not used before: what a tape costs.
    """

    lengths: Sequence[int]
    at_once: bool = False
    to_end: bool = False
    differentiates: bool = True
    schedule: Schedule | None = None
    fault_seconds: float = 0.0

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)


@dataclass(frozen=True)
class Slack:
    """What the allocator takes beside the bytes that are alive.

    Attributes:
        name: of what it does, where there is a choice: see `available`.
        threshold: bytes of a block from which on it is mapped by itself, and returned when it is freed.
        small: a share of those in smaller blocks, which come from a heap with holes.
        share: a share of all.
        fixed: and a number.
        keeps: whether freed blocks are used again without being mapped, and each of their pages touched, anew.
    """

    name: str
    threshold: int
    small: float
    share: float
    fixed: int
    keeps: bool = False

    def of(self, live: float, small: float) -> int:
        """Bytes, beside so many that are alive, so many of them in small blocks."""
        return int(self.share * live + self.small * small) + self.fixed


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        account: bytes by what they are for, without what the process holds before.
        seconds: predicted.
    """

    chunk: int
    schedule: Schedule
    account: dict[str, int]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """All of them."""
        return sum(self.account.values())


class Chooser:
    """Looks through the ways to do a piece of work."""

    def __init__(self, costs: Costs, work: Work, slack: Slack) -> None:
        self.costs, self.work, self.slack = costs, work, slack
        self._measured: frozenset[int] = frozenset()
        self._most = float("inf")

    def stay_below(self, chunk: float) -> None:
        """From now on try no larger chunks than that."""
        self._most = chunk

    def keep_to(self, sizes: Iterable[int]) -> None:
        """From now on try chunks of these sizes, and larger ones."""
        self._measured = frozenset(sizes)

    def best(self, num_bytes: int, chunks: Iterable[int] | None = None) -> Way | None:
        """The way to take with so many bytes beside what the process holds; None where none fits.

        Args:
            num_bytes: what there is.
            chunks: sizes to choose from; None: all that are tried.
        """
        sizes = self.chunks() if chunks is None else chunks
        fitting = [way for chunk in sizes for way in self.ways(chunk, num_bytes) if way.num_bytes <= num_bytes]
        if not fitting:
            return None
        fastest = min(way.seconds for way in fitting)
        near = [way for way in fitting if way.seconds <= _NEAR * fastest]
        return max(near, key=lambda way: (way.chunk, -way.num_bytes))

    def smallest(self, chunks: Iterable[int] | None = None) -> Way:
        """The way that takes the fewest bytes."""
        sizes = self.chunks() if chunks is None else chunks
        return min((way for chunk in sizes for way in self.ways(chunk, 0)), key=lambda way: way.num_bytes)

    def chunks(self) -> list[int]:
        """The sizes that are tried. None that leaves one token over, for which buffers of rows would have to grow."""
        longest, sizes, size = self.work.longest, set[int](), FLOOR
        while size < longest:
            sizes.add(size if size < 128 else size // 64 * 64)
            size = max(size + 1, size * 6 // 5)
        sizes |= {-(-longest // count) for count in range(1, 9)}
        if self._measured:
            most = max(self._measured)
            sizes = {size for size in sizes | self._measured if size in self._measured or size > most}
        most = max(self._most, min(sizes))
        return sorted(size for size in sizes if size <= most and (longest % size != 1 or size == 1))

    def ways(self, chunk: int, num_bytes: int) -> Iterator[Way]:
        """The ways with this chunk that could be worth it, the smallest among them, whether they fit or not."""
        count = len(Cut(self.work.longest, chunk))
        if not self.work.differentiates:
            yield self.way(chunk, Rebuild())
            return
        for schedule in self._schedules(chunk, count, num_bytes):
            yield self.way(chunk, schedule)
            tape = self._longest_tape(chunk, count, schedule, num_bytes)
            if tape:
                yield self.way(chunk, dataclasses.replace(schedule, tape=tape))

    def _schedules(self, chunk: int, count: int, num_bytes: int) -> Iterator[Schedule]:
        if self.work.schedule is not None:
            yield dataclasses.replace(self.work.schedule, tape=0)
            return
        yield Rebuild()
        if not self.costs.plain or count < 3:
            return
        yield Binomial(1)
        without = self.way(chunk, Binomial(1)).num_bytes
        each = (self.costs.plain + self.costs.sums) * self._sequences_at_once * (1 + self.slack.share)
        slots = 1 + int(max(0, num_bytes - without) / each)
        if 1 < slots < count - 1:
            yield Binomial(min(slots, _MOST_SLOTS))

    @property
    def _sequences_at_once(self) -> int:
        return len(self.work.lengths) if self.work.at_once else 1

    def _longest_tape(self, chunk: int, count: int, schedule: Schedule, num_bytes: int) -> int:
        """How many chunks' graphs fit. With several sequences: none, since each would have its own."""
        if len(self.work.lengths) > 1 or self.way(chunk, schedule).num_bytes > num_bytes:
            return 0
        low, high = 0, count
        while low < high:  # what it takes grows with it, but for states that are then not kept
            middle = (low + high + 1) // 2
            fits = self.way(chunk, dataclasses.replace(schedule, tape=middle)).num_bytes <= num_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def way(self, chunk: int, schedule: Schedule) -> Way:
        """What it takes to do the work so."""
        costs, work = self.costs, self.work
        cut = Cut(work.longest, chunk)
        count, at_once = len(cut), self._sequences_at_once
        tape = min(schedule.tape, count) if work.differentiates else 0
        swept = count - tape
        lengths = work.lengths if work.at_once else [work.longest]

        def of(name: str, number: int, fits: Mapping[str, Fit | Small]) -> float:
            start, stop = cut[number]
            return fits[name](stop - start, costs.given + start) if name in fits else 0.0

        def taped(number: int, fits: Mapping[str, Fit | Small]) -> float:
            """Graphs on the tape when it comes to a chunk: what they see of rows before them grows evenly."""
            first, last = swept if costs.reach is None else number - 1, number - 1
            return (number - swept) * (of("kept", first, fits) + of("kept", last, fits)) / 2 if number > swept else 0.0

        # of those on the tape and the others the last one has the most before it, the one before may be longer
        moments = [("forward", number) for number in (swept - 2, swept - 1) if number >= 0]
        moments += [("reverse", number) for number in {count - 2, count - 1, swept - 2, swept - 1} if number >= 0]
        name, number = max(moments, key=lambda one: of(*one, costs.bytes) + taped(one[1], costs.bytes))

        kept = 0
        if work.differentiates and swept:
            per_slot = costs.plain + (0 if schedule.rolls_back else costs.sums)
            slots = schedule.num_slots(swept) + (1 if tape or work.to_end else 0)
            kept = (slots if schedule.store in ("device", "host") else min(slots, _UNDER_WAY)) * per_slot
            kept += 0 if isinstance(schedule, Keep) else costs.plain  # the state at hand is none of those
        kept += 3 * costs.plain + costs.sums if tape else 0  # before the tape; its first chunk's own; after it
        held = len(work.lengths) if work.differentiates else 1  # the result has the adjoints
        log = costs.sums // 5  # of quanta that chunks widen after those that were measured
        account = {
            "gradients": costs.gradients,
            "state and adjoint": (int(costs.bytes["held"](chunk)) + log) * held + costs.final * len(work.lengths),
            "kept states": kept * at_once,
            "rows": sum(self._rows(length, chunk) for length in work.lengths),  # final states share them
            "outputs": int(costs.along * sum(work.lengths)),
            "checksums": sum(16 * costs.records * len(Cut(length, chunk)) for length in lengths),
            "one chunk": int(of(name, number, costs.bytes)),
            "tape": int(taped(number, costs.bytes)),
        }
        live = sum(account.values()) - costs.gradients
        in_heap = costs.bytes if self.slack.keeps else costs.small
        small = of(name, number, in_heap) + taped(number, in_heap) + account["state and adjoint"]
        account["allocator"] = self.slack.of(live, small)
        if costs.graph is not None:  # the allocator's share was measured with as many nodes as there are small blocks
            nodes = (tape + 1) * costs.graph(chunk, costs.given + cut[count - 1][0])
            account["nodes of graphs"] = max(0, int(nodes - min(1.0, self.slack.small) * small))
        return Way(chunk, schedule, account, self._seconds(chunk, schedule))

    def _rows(self, length: int, chunk: int) -> int:
        """Bytes of the rows of one sequence: the buffer is made for whole chunks, beside the rows that were given."""
        costs = self.costs
        room = -(-(costs.given + chunk * len(Cut(length, chunk))) // 64) * 64
        return int(costs.rows * (room + costs.given) + costs.row_grads * (costs.given + length))

    def _seconds(self, chunk: int, schedule: Schedule) -> float:
        costs, work, total = self.costs, self.work, 0.0

        def of_chunk(name: str, before: float) -> float:
            return costs.seconds[name](chunk, before) if name in costs.seconds else 0.0

        for length in work.lengths:
            count = len(Cut(length, chunk))
            tape = min(schedule.tape, count)
            swept, mean = count - tape, costs.given + max(0.0, (length - chunk) / 2)
            if not work.differentiates:
                seconds = count * of_chunk("forward", mean)
            else:
                more = 1 if swept and (tape or work.to_end) else 0
                advances = schedule.num_advances(swept) + more if swept else 0
                seconds = advances * of_chunk("forward", mean) + swept * of_chunk("reverse", mean)
                seconds += tape * of_chunk("tape", costs.given + length - tape * chunk / 2)
            if self.slack.keeps:
                seconds = max(seconds - self._faults(count, swept, tape, chunk, schedule), _LEAST * seconds)
            total += seconds * length / (count * chunk)  # the last chunk may be a short one
        if schedule.tape and "kept" in costs.bytes:
            count = min(schedule.tape, len(Cut(work.longest, chunk)))
            total += work.fault_seconds * (count - 1) * costs.bytes["kept"](chunk, work.longest)
        return total

    def _faults(self, count: int, swept: int, tape: int, chunk: int, schedule: Schedule) -> float:
        """Seconds that were measured for the first touches of large blocks."""
        work, large = self.work, self.costs.large

        def of(name: str) -> float:
            return large[name](chunk, self.costs.given) if name in large else 0.0

        if not work.differentiates:
            return work.fault_seconds * count * of("forward")
        more = 1 if swept and (tape or work.to_end) else 0
        advances = schedule.num_advances(swept) + more if swept else 0
        return work.fault_seconds * (advances * of("forward") + swept * of("reverse") + tape * of("tape"))


def too_small(budget: int, spent: int, way: Way) -> str:
    """That a budget cannot be met, by what it takes at least, and for what."""
    name = max(way.account, key=lambda name: way.account[name])
    least, held, more = in_megabytes(spent + way.num_bytes), in_megabytes(spent), in_megabytes(way.num_bytes)
    return (
        f"memory of {in_megabytes(budget)}: expected {least} at least. The process holds {held} already; {more} more "
        f"are needed with chunks of {way.chunk:,} and {schedule_as_text(way.schedule)}, most of them "
        f"({in_megabytes(way.account[name])}) for: {name}"
    )


def reasons(chooser: Chooser, way: Way, num_bytes: int) -> tuple[str, ...]:
    """Why this chunk, this schedule, this tape."""
    work, schedule, sizes = chooser.work, way.schedule, chooser.chunks()
    found = [f"chunk {way.chunk:,}: the largest of those that fit and are within 3 % of the fastest ({_at(way)})"]
    place = sizes.index(way.chunk)
    for other in (sizes[max(0, place - 4)], sizes[min(len(sizes) - 1, place + 4)]):
        if other != way.chunk:
            best = chooser.best(num_bytes, [other]) or chooser.smallest([other])
            found.append(
                f"{other:,} in its place: {_at(best)}" + ("" if best.num_bytes <= num_bytes else " (too much)")
            )
    if not work.differentiates:
        return tuple(found)
    if work.schedule is not None:
        found.append(f"{schedule_as_text(work.schedule)}: as asked for")
    elif schedule.rolls_back:
        found.append("rebuild: sums are rolled back" + (", plain tensors kept" if chooser.costs.plain else ""))
    else:
        found.append(f"{schedule_as_text(schedule)}: copies of the plain tensors for every chunk do not fit")
    if schedule.tape:
        without = chooser.way(way.chunk, dataclasses.replace(schedule, tape=0))
        found.append(f"tape: so many graphs fit; without it {_at(without)}")
    return tuple(found)


def _at(way: Way) -> str:
    return f"{way.seconds:.3g} s, {in_megabytes(way.num_bytes)} more"
