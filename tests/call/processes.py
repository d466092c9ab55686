"""Several processes of one test, that are ended if they do not end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing as mp


def run_processes(function: Callable[..., None], args: tuple[Any, ...], count: int, seconds: float = 200.0) -> None:
    """`function(rank, *args)` in `count` new processes; a failure of one is raised here."""
    context = mp.spawn(function, args=args, nprocs=count, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{function.__name__}: {count} processes were expected to end within {seconds:.0f} s")
