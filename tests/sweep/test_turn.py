"""Sweeps of several threads take turns; a backward pass lends its own to the thread that goes through it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import slimgrad as sg
from slimgrad.sweep.turn import Turn, in_autograds_thread

CUDA, OTHER, CPU = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
LONG = 20  # seconds, until a test gives up
SHORT = 0.2  # seconds, in which whoever may go on does


class Waiter:
    """A thread that takes the turn, and keeps it until it is told to go."""

    def __init__(self, turn: Turn, device: torch.device = CPU) -> None:
        self.has_it, self.go = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(turn, device), daemon=True)
        self._thread.start()

    def _run(self, turn: Turn, device: torch.device) -> None:
        try:
            with in_autograds_thread(device), turn.taken():
                self.has_it.set()
                assert self.go.wait(LONG)
        except (sg.SweepError, AssertionError) as error:
            self.error = error

    def end(self) -> None:
        self.go.set()
        self._thread.join(LONG)
        assert not self._thread.is_alive()


@pytest.fixture
def waiting() -> Iterator[Callable[..., Waiter]]:
    with ExitStack() as stack:

        def start(turn: Turn, device: torch.device = CPU) -> Waiter:
            one = Waiter(turn, device)
            stack.callback(one.end)
            return one

        yield start


def test_one_at_a_time_and_again_by_the_same(waiting: Callable[..., Waiter]) -> None:
    turn = Turn()
    with turn.taken(), turn.taken():
        other = waiting(turn)
        assert not other.has_it.wait(SHORT)
    assert other.has_it.wait(LONG)


@pytest.mark.parametrize(("device", "may"), [(CUDA, True), (OTHER, False), (CPU, False)], ids=str)
def test_lent_to_autograds_thread_of_the_device_alone(
    device: torch.device, may: bool, waiting: Callable[..., Waiter]
) -> None:
    turn = Turn()
    with turn.taken():
        other = waiting(turn, device)
        assert not other.has_it.wait(SHORT)
        with turn.lent(CUDA, wholly=True):
            assert other.has_it.wait(LONG if may else SHORT) == may
            other.go.set()
    assert other.has_it.wait(LONG)


def test_the_lender_waits_until_it_has_it_back(waiting: Callable[..., Waiter]) -> None:
    turn, gone_back, back, over = Turn(), *(threading.Event() for _ in range(3))

    def lend() -> None:
        with turn.taken():
            with turn.lent(CUDA, wholly=True):
                assert gone_back.wait(LONG)
            back.set()
            assert over.wait(LONG)

    thread = threading.Thread(target=lend, daemon=True)
    thread.start()
    other = waiting(turn, CUDA)
    assert other.has_it.wait(LONG)
    gone_back.set()  # the backward pass is done, and its turn still with the other
    assert not back.wait(SHORT)
    third = waiting(turn, CPU)
    other.end()
    assert back.wait(LONG)
    assert not third.has_it.wait(SHORT)  # who comes later does not come before
    over.set()
    assert third.has_it.wait(LONG)
    thread.join(LONG)


def test_not_lent_where_it_is_partly_on_the_cpu_and_refused(waiting: Callable[..., Waiter]) -> None:
    turn = Turn()
    with turn.taken():
        other, ordinary = waiting(turn, CUDA), waiting(turn, CPU)
        with turn.lent(CUDA, wholly=False):
            other._thread.join(LONG)
            assert isinstance(other.error, sg.SweepError)
            assert "waits for the thread in which this one runs" in str(other.error)
            assert not ordinary.has_it.wait(SHORT)


def test_on_a_cpu_nothing_is_lent(waiting: Callable[..., Waiter]) -> None:
    turn = Turn()
    with turn.taken(), turn.lent(CPU, wholly=True):
        assert not waiting(turn, CPU).has_it.wait(SHORT)


# One thread goes through every backward pass, as on an accelerator: chunks' own, and `loss.backward()` as a whole.
AS_ON_A_DEVICE = """
import contextlib, os, sys, threading, traceback, torch
from concurrent.futures import ThreadPoolExecutor
import slimgrad as sg
from slimgrad.call import outputs
from slimgrad.gradients.buffers import Gather
from slimgrad.sweep import turn
from tests.contract.kinds import Noisy, TOKENS, built

torch.set_num_threads(1)
device, errors = ThreadPoolExecutor(1), []
its_thread = device.submit(threading.get_ident).result()
backward = Gather.backward

def in_that_thread(call):
    return call() if threading.get_ident() == its_thread else device.submit(call).result()

for module in (turn, outputs):
    module.has_own_thread = lambda device: True
Gather.backward = lambda self, *given: in_that_thread(lambda: backward(self, *given))
Gather.is_inside = lambda self, device: self._thread is not None
if sys.argv[1] == "keeps":
    turn.Turn.lent = lambda self, device, *, wholly: contextlib.nullcontext()

def work(call, model):
    try:
        for _ in range(10):
            call(model)
    except BaseException as error:
        traceback.print_exc()
        errors.append(error)

calls = [
    lambda m: sg.backward(m, TOKENS, chunk=3),
    lambda m: in_that_thread(sg.loss(m, TOKENS, chunk=3).backward),
    lambda m: in_that_thread(sg.loss(m, TOKENS, chunk=5).backward),
]
models = [built(Noisy) for _ in calls]
threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(calls, models)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(40 if sys.argv[1] == "lends" else 2)
os._exit(2 if any(thread.is_alive() for thread in threads) else 1 if errors else 0)
"""


@pytest.mark.parametrize("how", ["lends", "keeps"])
def test_neither_waits_for_what_the_other_holds(how: str) -> None:
    """And both draw as they drew in their first sweep: or their losses would differ, which is refused."""
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_A_DEVICE, how],
        cwd=Path(__file__).parents[2], capture_output=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if how == "lends" else 2), done.stderr.decode()
