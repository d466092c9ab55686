"""The bytes that are alive are what torch's profiler says of its allocator, whoever frees them and when."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import slimgrad as sg
from slimgrad.budget.live import LiveBytes
from tests.budget.test_account import build

ROOT = Path(__file__).parents[2]


def test_it_is_what_the_profiler_says() -> None:
    """Of a forward and a backward pass, whose kernels have no workspaces of their own."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 70), torch.nn.Tanh(), torch.nn.Linear(70, 5))
    x = torch.randn(50, 30)

    def work() -> None:
        y = model(x)
        y.square().sum().backward()

    work()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    model.zero_grad()
    with LiveBytes() as live:
        work()
    assert live.peak == max(accumulate(changes))
    assert live.live == sum(changes)


def test_what_is_freed_later_is_seen() -> None:
    before = torch.zeros(1000)
    with LiveBytes([2000]) as live:
        large, view = torch.zeros(1000), before[:10]
        small = large[:100].clone()
        assert (live.live, live.small, live.peak) == (4400, [400], 4400)
        same = large.view(10, 100)
        del large
        assert live.live == 4400
        del same
        assert (live.live, live.small, live.peak) == (400, [400], 4400)
        live.reset_peak()
        assert (live.peak, live.peak_small) == (400, [400])
        large = torch.zeros(1000)
    assert live.peak == 4400
    del large, small, view
    assert (live.live, live.small) == (0, [0])


def test_a_run_comes_to_the_same_bits_and_the_same_bytes_each_time() -> None:
    model, tokens = build("performer")
    found: list[tuple[int, float]] = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            loss = sg.backward(model, tokens, chunk=100).loss
        found.append((live.peak, float(loss)))
    expected = sg.backward(model, tokens, chunk=100).loss
    assert found[0] == found[1]
    assert found[0][1] == float(expected)


def test_a_budget_does_not_load_the_compiler() -> None:
    """It takes a second and 40 MB, for good."""
    code = (
        "import sys, torch, slimgrad as sg\n"
        "from slimgrad.models import Performer, PerformerConfig\n"
        "model = Performer(PerformerConfig(layers=1, width=8, heads=2))\n"
        "assert sg.backward(model, torch.randint(256, (1, 100)), memory='8GiB').plan\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
