"""`slimgrad plan`: what a budget buys for a model and a length, and what other chunks and methods would take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slimgrad.budget.available import let_plans_set_malloc
from slimgrad.budget.choose import Chooser, Way
from slimgrad.budget.plan import Plan
from slimgrad.budget.planning import chooser_for
from slimgrad.bytelm import TrainConfig, build_model, open_model, pick_device
from slimgrad.bytelm.loop import autocast
from slimgrad.bytelm.planned import Extrapolated, extrapolate, gradient_request
from slimgrad.bytelm.presets import PRESETS, get_preset
from slimgrad.cli.budgeted import keep_within, load_what_loads_late
from slimgrad.cli.ways import ASKED, CHECKPOINT, CHOSEN, PLAIN, SLIMGRAD, Point, Ways, picture_ways, sketch_ways
from slimgrad.errors import InputError
from slimgrad.models import Performer
from slimgrad.runs.files import write_atomically
from slimgrad.sweep.allocation import is_allocation_failure
from slimgrad.sweep.schedules.names import schedule_as_text


def run_planning(
    name: str,
    *,
    memory: str | None,
    length: int | None,
    batch: int | None,
    chunk: int | None,
    out: Path | None,
    **how: Any,
) -> None:
    """Print the plan, its account and its reasons; draw time and memory over the chunk. Nothing is trained.

    Args:
        name: a preset, or what `open_model` opens.
        memory: the budget; None: what is free.
        length, batch: of the sequences; None: the preset's or the run's.
        chunk: one to be looked at beside the chosen one.
        out: where the picture goes, as a PNG.
        how: schedule and device, as a run's configuration has them.
    """
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: expected a folder to write to, found none at {out.parent}. Make it first")
    model, config = _open(name, length)
    config = config.replace(length=length, batch=batch, method="chunked", **how)
    config = dataclasses.replace(config, memory=memory)
    if chunk is not None and not 1 <= chunk <= config.length:
        raise InputError(f"--chunk {chunk}: expected 1 to {config.length:,}, the length of the sequence")
    if memory is None:
        let_plans_set_malloc()
        load_what_loads_late()
    keep_within(memory, config.device)
    model.to(pick_device(config.device))
    with autocast(config, model):
        plan, chooser = chooser_for(gradient_request(config, model), memory)
    _Shown(name, config, plan, chooser, _others(config, model)).show(chunk, out)


def _open(name: str, length: int | None) -> tuple[Performer, TrainConfig]:
    """The model and its run's configuration, or a preset's, before the first step."""
    if name in PRESETS:
        return build_model(get_preset(name)), get_preset(name)
    if not Path(name).exists():
        raise InputError(f"{name}: expected one of the presets {', '.join(PRESETS)}, or a run's folder; found neither")
    model, config = open_model(Path(name))
    if config is None:
        if length is None:
            raise InputError(f"{name} is a model without a run: expected --length beside it")
        config = get_preset("modern").replace(model=model.config)
    if config.memory is not None:  # then its schedule is that of a plan
        config = config.replace(schedule="auto")
    if config.windows == "documents":  # of which there is one at a time
        config = config.replace(windows="shuffled", batch=1)
    return model, config


def _others(config: TrainConfig, model: Performer) -> dict[str, Extrapolated]:
    """The methods without chunks; none where there is no memory for the short sequences that tell."""
    try:
        found = extrapolate(config, model, config.length)
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        return {}
    return {PLAIN: found["plain"], CHECKPOINT: found["checkpoint"]}


class _Shown:
    """A plan, and what there was to choose from."""

    def __init__(
        self, name: str, config: TrainConfig, plan: Plan, chooser: Chooser, others: dict[str, Extrapolated]
    ) -> None:
        self.config, self.plan, self.chooser, self.others = config, plan, chooser, others
        self.title = f"{name}: one gradient over {config.batch * config.length:,} tokens"
        self.spent = plan.peak - chooser.way(plan.chunk, plan.schedule).num_bytes  # whatever the way
        self.console = Console(highlight=False)

    def show(self, chunk: int | None, out: Path | None) -> None:
        """Print and draw."""
        beside = None if chunk is None else self._best(chunk)
        self._print_plan(beside)
        ways = self._ways(beside)
        self.console.print()
        for line in sketch_ways(ways):
            self.console.print(f"  {line}", markup=False, soft_wrap=True)
        self._print_others(ways)
        if out is not None:
            write_atomically(out, picture_ways(ways))
            self.console.print(f"\nthe picture is in [bold]{escape(str(out))}[/]")

    def _best(self, chunk: int) -> Way:
        """What would be chosen with this chunk; where nothing fits, the smallest."""
        free = self.plan.memory - self.spent
        return self.chooser.best(free, [chunk]) or self.chooser.smallest([chunk])

    def _point(self, way: Way) -> Point:
        return Point((self.spent + way.num_bytes) / 1e6, way.seconds)

    def _ways(self, beside: Way | None) -> Ways:
        plan = self.plan
        marked = {CHOSEN: (plan.chunk, Point(plan.peak / 1e6, plan.seconds))}
        if beside is not None:
            marked[ASKED] = (beside.chunk, self._point(beside))
        return Ways(
            chunks={chunk: self._point(self._best(chunk)) for chunk in self.chooser.chunks()},
            marked=marked,
            others={
                name: Point((self.spent + other.num_bytes) / 1e6, other.seconds) for name, other in self.others.items()
            },
            budget=plan.memory / 1e6,
            title=self.title,
        )

    def _print_plan(self, beside: Way | None) -> None:
        plan, print_ = self.plan, self.console.print
        print_(f"[bold]{escape(self.title)}[/]")
        print_(f"chunk [bold]{plan.chunk:,}[/], schedule [bold]{schedule_as_text(plan.schedule)}[/]")
        print_(f"{self._speed(plan.seconds)}; at most {plan.peak / 1e6:,.1f} MB of {plan.memory / 1e6:,.1f} MB\n")
        table = Table.grid(padding=(0, 3))
        for _ in range(4):
            table.add_column(justify="right")
        way = self.chooser.way(plan.chunk, plan.schedule)
        before = [name for name in plan.account if name not in way.account]  # the same whatever the way
        accounts = [plan.account]
        if beside is not None:
            accounts.append({name: plan.account[name] for name in before} | beside.account)
        heads = ["MB", "share", *(["" if beside is None else f"MB, chunk {beside.chunk:,}"])]
        table.columns[0].justify = "left"
        table.add_row("", *(f"[bold]{head}[/]" for head in heads))
        for name in (*before, *way.account):
            num_bytes = [account.get(name, 0) for account in accounts]
            if any(num_bytes):
                table.add_row(name, *_row(num_bytes, plan.peak))
        table.add_row("[bold]all of it[/]", *_row([sum(account.values()) for account in accounts], plan.peak))
        print_(table)
        print_()
        for reason in plan.reasons:
            print_(f"  {escape(reason)}", soft_wrap=True)
        if beside is not None:
            how = f"--chunk {beside.chunk:,}: {schedule_as_text(beside.schedule)}, {self._speed(beside.seconds)}"
            print_(f"  {how}" + (", too much" if self.spent + beside.num_bytes > plan.memory else ""), soft_wrap=True)

    def _speed(self, seconds: float) -> str:
        tokens = self.config.batch * self.config.length
        return f"{seconds:,.3g} s, {tokens / max(seconds, 1e-9):,.0f} tokens per second"

    def _print_others(self, ways: Ways) -> None:
        if not self.others:
            self.console.print("\n  Without chunks there is no memory even for a few hundred tokens.")
            return
        first, last = next(iter(self.others.values())).from_lengths
        table = Table.grid(padding=(0, 3))
        for name, point in {SLIMGRAD: ways.marked[CHOSEN][1], **ways.others}.items():
            table.add_row(f"  {name}", f"[bold]{point.megabytes:,.0f} MB[/]", f"{point.seconds:,.3g} s")
        self.console.print()
        self.console.print(table)
        self.console.print(
            f"  The last two are extrapolated, by a straight line through {first:,} and {last:,} tokens."
        )


def _row(num_bytes: list[int], peak: int) -> list[str]:
    return [f"{num_bytes[0] / 1e6:,.1f}", f"{num_bytes[0] / peak:.1%}", *(f"{x / 1e6:,.1f}" for x in num_bytes[1:])]
