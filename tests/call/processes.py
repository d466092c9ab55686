"""Several processes of one test, that are ended if they do not end."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing as mp

import slimgrad as sg


def run_processes(function: Callable[..., None], args: tuple[Any, ...], count: int, seconds: float = 200.0) -> None:
    """`function(rank, *args)` in `count` new processes; a failure of one is raised here."""
    context = mp.spawn(_say_where_after, args=(0.9 * seconds, function, *args), nprocs=count, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{function.__name__}: {count} processes were expected to end within {seconds:.0f} s")


def _say_where_after(rank: int, seconds: float, function: Callable[..., None], *args: Any) -> None:
    """One of the processes: one that does not end prints what each of its threads is at."""
    faulthandler.dump_traceback_later(seconds)
    function(rank, *args)


def refusals(ways: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What each way says when it is refused."""
    said = {}
    for name, way in ways.items():
        try:
            way()
            said[name] = "nothing"
        except sg.ModelError as error:
            said[name] = str(error)
    return said
