"""Streams, threads and pinned memory: work that is still under way when Python goes on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.contract import contract
from tests.cuda.device import DEVICE, IS_CUDA, MODELS, PLACES, SCHEDULES, on_cuda_only, on_device
from tests.toy_models import GatedRecurrence

ROOT = Path(__file__).parents[2]
CYCLES = 5_000_000  # a few milliseconds


def slow() -> None:
    """Keep the current stream busy."""
    if IS_CUDA:
        torch.cuda._sleep(CYCLES)


class _SlowBack(torch.autograd.Function):
    """Its backward pass keeps the stream busy first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slow()
        return g


@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["gated", "all kinds", "performer"])
def test_on_a_stream_of_the_callers(name: str, schedule: str, store: str) -> None:
    """Also what is read from files beside the computation, by another thread."""
    build = on_device(MODELS[name])
    model, inputs, targets = build()
    expected = contract.without_state(contract.plain(model, inputs, targets))
    stream = torch.cuda.Stream() if IS_CUDA else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    for way in ("backward", "loss"):
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            chosen = SCHEDULES[schedule](store=store, rows=store)
            model.register_forward_pre_hook(lambda *_: slow())
            got = contract.chunked(way, model, inputs, targets, chunk=16, schedule=chosen)
            if stream is not None:
                stream.synchronize()
        contract.require_close(contract.without_state(got), expected)


@on_cuda_only
@pytest.mark.parametrize("store", PLACES)
def test_a_default_stream_that_is_busy_is_no_matter(store: str) -> None:
    """A thread that reads beside the computation works on the default stream unless it is told otherwise."""
    build = on_device(MODELS["gated"])
    expected = contract.without_state(contract.plain(*build()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    model, inputs, targets = build()
    torch.cuda.synchronize()

    def busy(_: sg.Event) -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda._sleep(4 * CYCLES)

    with torch.cuda.stream(stream):
        sg.backward(model, inputs, targets, chunk=8, schedule=sg.Binomial(3, store=store), on_chunk=busy)
        stream.synchronize()
        error, name = contract.worst_error(contract.collect(model, None, None), expected[1])
    assert error <= contract.TOLERANCE, (name, error)


class Beside(GatedRecurrence):
    """Part of its step is on a stream of its own, joined again before it is used: allowed, and common."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        if not IS_CUDA:
            return outputs + self.extra(self.embed(inputs)), following
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            more = _SlowBack.apply(self.extra(self.embed(inputs)))
        main.wait_stream(self.side)
        return outputs + more, following


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad")  # torch's own remark on streams
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_a_model_with_a_stream_of_its_own(way: str) -> None:
    torch.manual_seed(1)
    model = Beside()
    model.extra = nn.Linear(6, 13)
    model = model.to(DEVICE, torch.float64)
    if IS_CUDA:
        model.side = torch.cuda.Stream()
    inputs = torch.randint(0, 13, (2, 64), device=DEVICE)
    expected = contract.without_state(contract.plain(model, inputs, None))
    if IS_CUDA:
        torch.cuda.synchronize()
    for _ in range(3):
        got = contract.chunked(way, model, inputs, None, chunk=16)
        error, name = contract.worst_error(contract.without_state(got)[1], expected[1])
        assert error <= contract.TOLERANCE, (name, error)


class Slow(nn.Module):
    """A plain tensor as state, and a device that is far behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.head.weight.new_zeros(batch_size, 8)

    def forward(self, inputs: Tensor, h: Tensor) -> Any:
        slow()
        y = h[:, None] + self.embed(inputs).cumsum(1)
        return self.head(torch.tanh(y)), y[:, -1]


@on_cuda_only
@pytest.mark.parametrize("call", ["evaluate", "outputs", "backward", "loss"])
def test_pinned_inputs_may_be_written_to_after_the_call(call: str) -> None:
    """They are copied without waiting: then nothing may be under way when the caller has its buffer back."""
    torch.manual_seed(1)
    model, given = Slow().to(DEVICE, torch.float64), torch.randint(0, 13, (1, 4096))
    exact = sg.evaluate(model, given.to(DEVICE), chunk=256).loss
    plain = torch.no_grad()(sg.outputs)(model, given.to(DEVICE), chunk=256)
    buffer = given.pin_memory()
    if call == "evaluate":
        found, expected = sg.evaluate(model, buffer, chunk=256).loss, exact
    elif call == "outputs":
        with torch.no_grad():
            found, expected = sg.outputs(model, buffer, chunk=256), plain
    elif call == "backward":
        # it adds the chunks' losses up from the last to the first, which may differ in the last bit
        expected = sg.backward(model, given.to(DEVICE), chunk=256).loss
        found = sg.backward(model, buffer, chunk=256).loss
    else:
        found, expected = sg.loss(model, buffer, chunk=256).detach(), exact
    buffer.fill_(0)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


TWO_THREADS = """
import os, threading, traceback, torch
import slimgrad as sg
from tests.contract.kinds import Noisy, TOKENS, built
from tests.cuda.device import DEVICE
torch.set_num_threads(1)
tokens, errors = TOKENS.to(DEVICE), []

def work(call, model):
    try:
        for _ in range(25):
            call(model)
    except BaseException as error:
        traceback.print_exc()
        errors.append(error)

calls = [lambda m: sg.backward(m, tokens, chunk=3), lambda m: sg.loss(m, tokens, chunk=3).backward()]
models = [built(Noisy).to(DEVICE) for _ in calls]  # here: they draw their weights
threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(calls, models)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
os._exit(2 if any(thread.is_alive() for thread in threads) else 1 if errors else 0)
"""


def test_two_models_in_two_threads() -> None:
    """One goes back in its own thread, one in autograd's: neither may wait for what the other holds."""
    done = subprocess.run([sys.executable, "-c", TWO_THREADS], cwd=ROOT, capture_output=True, timeout=90, check=False)
    assert done.returncode != 2, "the threads wait for each other"
    assert done.returncode == 0, done.stderr.decode()
