"""A plan for a call: what the public functions ask for, and what they remember between calls.

What was measured of a model is kept with it, by all that it depends on (see `use_of`), so that later calls, over other
lengths or within other budgets, measure nothing. A plan is kept too; on a CPU it is made anew where the process holds
so much more than when it was made (an optimiser's moments) that it would not fit.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from slimgrad.budget.available import fault_seconds, free_bytes, held_bytes, slack, slacks, use_malloc
from slimgrad.budget.choose import Chooser, Slack, Way, Work, reasons, too_small
from slimgrad.budget.plan import Plan
from slimgrad.budget.probe import PROBED_TAPE, MakeCall, Prober, as_it_was
from slimgrad.budget.process import resident_bytes
from slimgrad.budget.request import Request, lengths_of, tokens_between, use_of
from slimgrad.budget.size import parse_bytes
from slimgrad.call.arguments import DEFAULT_CHUNK, Call, Options, logger
from slimgrad.call.model import device_of
from slimgrad.errors import InputError
from slimgrad.sweep.cut import Cut
from slimgrad.sweep.moves import FLOOR
from slimgrad.sweep.program import OnChunk
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.keep import Keep

SIZES, CHUNKS = (FLOOR, 64, 128, 256), 4  # of the first measurements
FEW = (32, 8)  # in their place, where large batches leave no room for these
FAR_TOKENS = 8192  # and of rows: chunks with many tokens before them, up to so many
_SHARE = 16  # a chosen size is measured too, if two chunks of it are one in so many of the tokens
_STEP = 4  # from one size to the next that is measured: more is too far to tell what it would take
_TELLS = 64  # tokens: below, what a chunk takes whatever its size hides what each token takes
_LARGE_ENOUGH = 1024  # or no more than these
_NEAR = 1.5  # times a size that was measured is near enough
_MORE = 6  # sizes that are measured for one plan
_FASTER = 0.97  # times the seconds: less is worth more memory


@dataclass
class _Known:
    """What was measured of a model in one use of it, and the plans that were made of it, with what was held then."""

    prober: Prober
    plans: dict[Any, tuple[Plan, int]] = field(default_factory=dict[Any, "tuple[Plan, int]"])


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Known]] = weakref.WeakKeyDictionary()


def decide(request: Request, *, chunk: int | None, memory: int | str | None, plan: Plan | None) -> Options:
    """The options of a call, with chunk and schedule as they were named, or as a budget buys them.

    Args:
        request: the call; the chunk in its options is not looked at.
        chunk, memory, plan: what the caller named, one of them at most. None of them: a sequence of no more than
            `DEFAULT_CHUNK` tokens is one chunk, and of a longer one the memory is what is free.

    Raises:
        InputError: more than one; or as `make_plan`.
    """
    options = request.options
    named = [name for name, x in (("chunk", chunk), ("memory", memory), ("plan", plan)) if x is not None]
    if len(named) > 1:
        raise InputError(
            f"{' and '.join(f'{name}=' for name in named)}: expected one of them. memory= chooses the chunk"
        )
    if plan is not None:
        if options.schedule not in (None, plan.schedule):
            raise InputError(f"schedule={options.schedule}: expected none beside plan=, which has {plan.schedule}")
        use_malloc(plan.malloc)
        return options._replace(chunk=plan.chunk, schedule=plan.schedule, plan=plan)
    if chunk is not None:
        return options._replace(chunk=chunk)
    if memory is None and max(lengths_of(request.inputs), default=0) <= DEFAULT_CHUNK:
        return options._replace(chunk=DEFAULT_CHUNK)
    found = make_plan(request, memory)
    logger.info("plan: %s", found)
    return options._replace(chunk=found.chunk, schedule=found.schedule, plan=found)


def make_plan(request: Request, memory: int | str | None) -> Plan:
    """The fastest plan for a call within a budget.

    Args:
        request: the call. It is checked first.
        memory: bytes, or text as "2GiB"; None: what the process holds and nine tenths of what is free.

    Raises:
        InputError: an argument does not fit; the budget is too small: the smallest that would do; or there is none, and
            the system does not say how much is free.

    Cost: when a model is first used so, 4 chunks of 16, 64, 128 and 256 tokens, forward and back three times, and two
    of the chosen size where that is little of the whole; with rows, some more. Later calls like it: next to nothing.
    """
    model = request.model
    device = device_of(model)
    budget = None if memory is None else _bytes(memory)
    lengths = lengths_of(request.inputs)
    known = _known.setdefault(model, {}).setdefault(
        (use_of(request), slacks(device)[0].threshold), _Known(_prober(request, device))
    )
    wanted = (lengths, budget, request.options.schedule, tuple(request.reserved.items()), slacks(device))
    if wanted in known.plans and _still_fits(*known.plans[wanted], device):
        plan, _ = known.plans[wanted]
        use_malloc(plan.malloc)
        return plan
    with as_it_was(model):
        options = request.options
        checked = request.call(request.inputs, request.targets, 1, options.schedule, None, options.state)
        if request.differentiates and not request.head:
            checked.require_something_to_differentiate()
        made = _Planning(request, known.prober, lengths, budget, device)
        try:
            known.plans[wanted] = made.fastest(), made.held
        finally:
            known.prober.states.clear()
    return known.plans[wanted][0]


def chooser_for(request: Request, memory: int | str | None) -> tuple[Plan, Chooser]:
    """The plan of `make_plan`, and what it was chosen from, to look at other ways; raises as that does.

    What the plan's account has beside its own way (`chooser.way(plan.chunk, plan.schedule)`) is there with any other.
    """
    plan = make_plan(request, memory)
    own = slacks(device_of(request.model))
    known = _known[request.model][use_of(request), own[0].threshold]
    return plan, _chooser(request, known.prober, next(one for one in own if one.name == plan.malloc))


def _chooser(request: Request, prober: Prober, slack: Slack) -> Chooser:
    """Over what was measured so far."""
    device = device_of(request.model)
    returns = request.head and request.differentiates  # a loss or outputs, to go back from later
    work = Work(
        lengths_of(request.inputs),
        at_once=returns,
        to_end=returns,
        differentiates=request.differentiates,
        schedule=request.options.schedule,
        fault_seconds=fault_seconds() if device.type == "cpu" else 0.0,
    )
    return Chooser(prober.costs, work, slack)


def _prober(request: Request, device: torch.device) -> Prober:
    return Prober(head=request.head, differentiates=request.differentiates, threshold=slacks(device)[0].threshold)


def _still_fits(plan: Plan, held: int, device: torch.device) -> bool:
    """Whether the process does not hold so much more than when the plan was made that it would go beyond its budget."""
    if device.type != "cpu":
        return True
    if plan.peak + (resident_bytes() or 0) - held <= plan.memory:
        return True
    return plan.peak + (held_bytes(device) or 0) - held <= plan.memory


def _bytes(memory: int | str) -> int:
    found = parse_bytes(memory) if isinstance(memory, str) else memory
    if isinstance(found, bool) or not isinstance(cast(object, found), int) or found < 1:
        raise InputError(f"memory={memory!r}: expected an amount such as '2GiB', or bytes as a whole number")
    return found


class _Planning:
    """One plan in the making: what is missing is measured, and then a way chosen."""

    def __init__(
        self, request: Request, prober: Prober, lengths: tuple[int, ...], budget: int | None, device: torch.device
    ) -> None:
        self.request, self.prober, self.lengths, self.device = request, prober, lengths, device
        self.longest = max(lengths)
        self.held = 0
        self._given = budget

    def fastest(self) -> Plan:
        """The best plan under any malloc that may be chosen, which is then set.

        A heap that has kept something uses it before it maps again, so that nothing can be measured there as if it had
        not. So costs are those under the first, and what others spare is computed.
        """
        first, *others = slacks(self.device)
        plan = self._plan(first)
        for other in others:
            with suppress(InputError):  # the first needs the least
                found = self._plan(other)
                plan = found if found.seconds < _FASTER * plan.seconds else plan
        use_malloc(plan.malloc)
        return plan

    def _plan(self, slack: Slack) -> Plan:
        """Measure, and choose."""
        request, longest = self.request, self.longest
        self.held = held_bytes(self.device) or 0
        for size in (*SIZES, *FEW):  # two at least, or nothing could be told of others
            wanted = size in SIZES or len(self.prober.sizes) < 2
            known = size in self.prober.sizes or size * CHUNKS > longest
            if wanted and not known and self._has_room(size, CHUNKS * size):
                self._measure(size, CHUNKS * size)
        if not self.prober.sizes:
            self._measure(size := max(1, longest // CHUNKS), min(CHUNKS * size, longest))
        self._measure_far(*SIZES)
        left = _MORE
        while True:
            gc.collect()  # what a sweep leaves behind refers to itself
            self.held = held_bytes(self.device) or 0
            budget = self._budget()
            chooser = _chooser(request, self.prober, slack)
            spent = self.held + sum(request.reserved.values())
            if not left:
                chooser.keep_to(self.prober.sizes)
            way = chooser.best(budget - spent) or chooser.smallest()
            limit = max(_LARGE_ENOUGH, longest // _SHARE)
            most = max(self.prober.sizes)
            size = min(way.chunk if way.chunk <= _NEAR * limit else limit, _STEP * most)
            more = left and (size not in self.prober.sizes if way.chunk == size else size > _NEAR * most)
            tokens = min(longest, (CHUNKS if self.prober.costs.rows else 2) * size)
            tokens = tokens if self._has_room(size, tokens) else min(longest, 2 * size)
            if more and not self._has_room(size, tokens):
                more = 0
                chooser.stay_below(_NEAR * most)
                way = chooser.best(budget - spent) or chooser.smallest()
            if not more:
                if way.num_bytes > budget - spent:
                    raise InputError(too_small(budget, spent, way))
                return self._as_plan(chooser, way, budget, spent)
            left -= 1
            self._measure(size, tokens)
            self._measure_far(size)

    def _has_room(self, chunk: int, tokens: int) -> bool:
        """Whether measuring stays within the budget, as far as smaller sizes tell. The smallest is measured anyway."""
        if not self.prober.sizes:
            return True
        work = Work((tokens,), differentiates=self.request.differentiates)
        tape = min(PROBED_TAPE, len(Cut(tokens, chunk)) - 1)
        chooser, most = Chooser(self.prober.costs, work, slack(self.device)), max(self.prober.sizes)
        predicted = chooser.way(chunk, Keep(tape=tape)).num_bytes
        if most < _TELLS:
            way = chooser.way(most, Keep(tape=tape))
            grows = way.num_bytes - way.account["gradients"] - chooser.slack.fixed
            predicted = way.num_bytes + grows * max(0, chunk // most - 1)
        return self.held + predicted <= self._budget()

    def _budget(self) -> int:
        if self._given is not None:
            return self._given
        free = free_bytes(self.device)
        if free is None or not self.held:
            raise InputError("memory: this system does not say how much is free; expected memory= or chunk=")
        return self.held + free

    def _measure(self, chunk: int, tokens: int) -> None:
        self.prober.measure(self._maker(chunk, 0, self._own(self.request.options.state)), chunk, tokens)

    def _measure_far(self, *sizes: int) -> None:
        """Of a state with rows: chunks that have many more tokens before them than they are long."""
        prober, states = self.prober, self.prober.states
        far = min(self.longest - 2 * max(sizes), FAR_TOKENS)
        if not prober.costs.rows or far <= 0 or not (set(sizes) - set(SIZES) or far > prober.far):
            return
        prober.far = max(prober.far, far)
        for size in sorted(sizes, reverse=True):
            self._go_to(min(self.longest - 2 * size, FAR_TOKENS))
            fitting = [before for before in states if CHUNKS * size <= before <= self.longest - 2 * size]
            for before in {min(fitting), max(fitting)} if fitting else ():
                prober.measure_after(self._maker(size, before, states[before]), size, before)

    def _go_to(self, tokens: int) -> None:
        """Find the state after so many tokens."""
        states = self.prober.states
        if tokens not in states:
            begin = max((before for before in states if before < tokens), default=0)
            state = states.get(begin, self._own(self.request.options.state))
            call = self._maker(max(SIZES), begin, state)(tokens - begin, Keep(), None)
            states[tokens] = call.start(0, differentiates=False).run.forward()

    def _own(self, given: Any) -> Any:
        """Of inputs, targets or states of several sequences, those of the longest."""
        if given is None or not isinstance(self.request.inputs, list):
            return given
        return given[self.lengths.index(self.longest)]

    def _maker(self, chunk: int, first: int, state: Any) -> MakeCall:
        request = self.request
        inputs, targets = self._own(request.inputs), self._own(request.targets)

        def make(tokens: int, schedule: Schedule, on_chunk: OnChunk | None) -> Call:
            span = first, first + tokens
            goals = None if targets is None else tokens_between(targets, *span)
            return request.call(tokens_between(inputs, *span), goals, chunk, schedule, on_chunk, state)

        return make

    def _as_plan(self, chooser: Chooser, way: Way, budget: int, spent: int) -> Plan:
        model = self.request.model
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        account = {"weights": weights, "everything else that was there": max(0, self.held - weights)}
        account |= {**self.request.reserved, **way.account}
        return Plan(
            chunk=way.chunk,
            schedule=way.schedule,
            memory=budget,
            account={name: num_bytes for name, num_bytes in account.items() if num_bytes},
            seconds=way.seconds,
            length=sum(self.lengths),
            reasons=reasons(chooser, way, budget - spent),
            malloc=chooser.slack.name,
        )
