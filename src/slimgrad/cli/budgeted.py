"""What every command with a budget does before its work, and says after it."""

from __future__ import annotations

import torch
from rich.console import Console

from slimgrad.budget.available import let_plans_set_malloc
from slimgrad.budget.plan import Plan
from slimgrad.budget.process import peak_resident_bytes, reset_peak, resident_bytes
from slimgrad.budget.size import parse_bytes
from slimgrad.budget.wall import set_wall
from slimgrad.bytelm import TrainConfig, pick_device, train
from slimgrad.bytelm.planned import plan_run
from slimgrad.cli.curve import picture
from slimgrad.cli.words import megabytes
from slimgrad.data import Corpus, Documents
from slimgrad.models import PerformerConfig


def keep_within(memory: str | None, device: str, *, trains: bool = True, has_plan: bool = True) -> None:
    """Make this process one that keeps to a budget: before anything large is made in it.

    Plans choose what malloc does with large blocks, what training loads late is loaded, so that it is part of what
    the process holds, and the wall is set behind the budget. Nothing without a budget, with one on another device, or
    with one that is below what the process holds, which planning then refuses.

    Args:
        memory: the budget, in words.
        device: as a run's configuration has it.
        trains: whether there will be an optimiser, and a picture.
        has_plan: whether a plan will keep to the budget; else the wall does.
    """
    if memory is None or pick_device(device).type != "cpu":
        return
    budget = parse_bytes(memory)
    if budget > (resident_bytes() or 0):
        let_plans_set_malloc()
        if trains:
            load_what_loads_late()
        set_wall(budget, has_plan=has_plan)


def load_what_loads_late() -> None:
    """Train for one tiny step and draw it: what torch and matplotlib load when first used is then part of the base."""
    tiny = PerformerConfig(layers=1, width=8, heads=1)
    config = TrainConfig(model=tiny, length=8, chunk=4, steps=1, learning_rate=1e-3, validation_bytes=4)
    text = Documents([torch.zeros(64, dtype=torch.uint8)])
    picture(train(config, Corpus(name="tiny", source="zeros", text=text)).rows, "")


def plan_visibly(config: TrainConfig) -> Plan | None:
    """The plan of a run, as `plan_run` has it; a terminal says meanwhile what takes so long.

    The peak begins anew after it: what was measured for the plan was within the budget, and is no part of the account.
    """
    with Console(stderr=True).status("measuring what chunks take"):
        plan = plan_run(config)
    reset_peak()
    return plan


def peak_in_words(memory: str, plan: Plan | None) -> str:
    """The most that this process held, against its budget and against what was predicted."""
    predicted = "" if plan is None else f"; predicted {megabytes(plan.peak)}"
    return f"at most {megabytes(peak_resident_bytes())} resident, of {megabytes(parse_bytes(memory))}{predicted}"
