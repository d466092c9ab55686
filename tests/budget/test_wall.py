"""The wall behind a budget: beyond what resident memory needs, in the way of what runs away."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from slimgrad.budget import process
from slimgrad.budget.wall import set_wall

LIMITED = """
import sys
import torch
from slimgrad.budget.process import proc_status, resident_bytes
from slimgrad.budget.wall import set_wall

budget, has_plan = resident_bytes() + 400_000_000, sys.argv[1] == "plan"
wall = set_wall(budget, has_plan=has_plan)
blocks = []
try:
    while len(blocks) < 200:
        blocks.append(torch.ones(10_000_000, dtype=torch.uint8))
except RuntimeError:
    pass
print(wall - proc_status("VmData") < 20_000_000, resident_bytes() / budget)
blocks.clear()
print(set_wall(2 * budget, has_plan=has_plan), int(torch.ones(1000).sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all data on Linux alone")
@pytest.mark.parametrize(("what", "low", "high"), [("plan", 1.0, 2.0), ("no plan", 0.7, 1.0)])
def test_resident_memory_may_reach_the_budget_and_not_go_far_beyond(what: str, low: float, high: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, what],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (stopped, reached), (again, alive) = (line.split() for line in done.stdout.splitlines())
    assert stopped == "True"
    assert low <= float(reached) <= high
    assert (again, alive) == ("None", "1000")  # a lower limit stays


def test_where_there_is_nothing_to_limit_there_is_no_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_wall(1) is None
    monkeypatch.setattr(process, "proc_status", lambda _: None)
    assert set_wall(1 << 50) is None
