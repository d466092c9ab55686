"""Memory of the device that runs out: the chunk is taken in parts, or refused by name; and what a length costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.sweep.allocation import is_allocation_failure
from tests.contract import contract
from tests.cuda.device import DEVICE, IS_CUDA, on_cuda_only
from tests.cuda.memory import peak_reserved
from tests.toy_models import CachedAttention, LinearAttention

CHUNK, LENGTH = 2048, 6144
SHARES = (0.3, 0.5, 0.7, 0.9) if IS_CUDA else (0.5,)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "sums": lambda: LinearAttention(width=64),
    "rows": lambda: CachedAttention(width=32),
}


class Narrow(nn.Module):
    """On a CPU, where no limit can be set: refuses more than so many tokens at once, as an allocator does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.most = model, [1 << 62]  # a list: a sweep puts plain attributes back

    def initial_state(self, batch_size: int) -> Any:
        return self.model.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Any) -> Any:
        if inputs.shape[1] > self.most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return self.model(inputs, state)


def built(kind: str) -> tuple[Narrow, Tensor]:
    torch.manual_seed(1)
    return Narrow(KINDS[kind]().double()).to(DEVICE), torch.randint(0, 13, (1, LENGTH), device=DEVICE)


def peak(call: Callable[[], Any]) -> int:
    """The most bytes allocated during a call."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


@contextmanager
def limited(model: Narrow, share: float, most: int, least: int) -> Generator[None]:
    """Within it there is memory for `share` of what lies between two measured peaks."""
    if not IS_CUDA:
        model.most[0] = 1024
        yield
        model.most[0] = 1 << 62
        return
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((least + share * (most - least)) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def peaks(model: Narrow, inputs: Tensor, way: Callable[..., Any]) -> tuple[int, int]:
    if not IS_CUDA:
        return 1, 0
    found = [peak(lambda chunk=chunk: way(model, inputs, chunk=chunk)) for chunk in (CHUNK, CHUNK // 4)]
    model.zero_grad()
    return found[0], found[1]


def backward(model: nn.Module, inputs: Tensor, **options: Any) -> None:
    sg.backward(model, inputs, **options)


def loss(model: nn.Module, inputs: Tensor, **options: Any) -> None:
    sg.loss(model, inputs, **options).backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [backward, loss], ids=["backward", "loss"])
@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Binomial(2)], ids=["Rebuild", "Binomial"])
def test_a_chunk_that_does_not_fit(
    kind: str, way: Callable[..., Any], schedule: sg.Schedule, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = built(kind)
    way(model, inputs, chunk=CHUNK // 4, schedule=schedule)
    expected = contract.collect(model, None, None)
    most, least = peaks(model, inputs, lambda *args, **options: way(*args, schedule=schedule, **options))
    print(f"{kind}: {most >> 20} MiB at {CHUNK} tokens, {least >> 20} at {CHUNK // 4}")
    assert most > 1.5 * least, "the test's own chunks are too small"
    came = []
    for share in SHARES:
        caplog.clear()
        with limited(model, share, most, least), caplog.at_level(logging.WARNING, "slimgrad"):
            try:
                way(model, inputs, chunk=CHUNK, schedule=schedule)
            except sg.MemoryLimitError as error:
                came.append(f"refused: {error}")
        if came and came[-1].startswith("refused") and len(came) == SHARES.index(share) + 1:
            assert all(p.grad is None for p in model.parameters())
            continue
        error, name = contract.worst_error(contract.collect(model, None, None), expected)
        assert error <= contract.TOLERANCE, (share, name, error)
        came.append("in parts" if "taken in parts" in caplog.text else "whole")
    print("\n".join(came))
    assert "in parts" in came, came


def test_a_saved_segment_goes_on_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where memory runs out in a backward pass whose gradients cannot be told from others'."""
    model, inputs = built("sums")
    backward(model, inputs, chunk=CHUNK // 4)
    expected = contract.collect(model, None, None)
    most, least = peaks(model, inputs, backward)
    for share in SHARES:
        segment = sg.Segment(model, inputs, chunk=CHUNK, schedule=sg.Keep())
        segment.forward()
        segment.save(tmp_path)
        with limited(model, share, most, least), caplog.at_level(logging.WARNING, "slimgrad"):
            segment.reverse()
        error, name = contract.worst_error(contract.collect(model, None, None), expected)
        assert error <= contract.TOLERANCE, (share, name, error)
    assert "taken in parts" in caplog.text or "going on from" in caplog.text


def test_next_to_no_memory_is_refused_by_name_or_made_do_with() -> None:
    model, inputs = built("sums")
    backward(model, inputs, chunk=CHUNK // 4)
    expected = contract.collect(model, None, None)
    most, least = peaks(model, inputs, backward)
    refused = False
    with limited(model, -0.8 * least / max(most - least, 1), most, least):
        model.most[0] = 1 << 62 if IS_CUDA else 8
        try:
            sg.backward(model, inputs, chunk=CHUNK)
        except sg.MemoryLimitError as error:
            refused = "did not fit into memory" in str(error)
    model.most[0] = 1 << 62
    found = contract.collect(model, None, None)
    assert (not found) if refused else contract.worst_error(found, expected)[0] <= contract.TOLERANCE
    assert refused or IS_CUDA
    backward(model, inputs, chunk=CHUNK // 4)  # the device goes on as if nothing had been
    assert contract.worst_error(contract.collect(model, None, None), expected)[0] <= contract.TOLERANCE


@on_cuda_only
def test_what_the_device_says_is_known_for_what_it_is() -> None:
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    with pytest.raises(torch.OutOfMemoryError) as found:
        torch.empty(2 * whole, dtype=torch.uint8, device=DEVICE)
    assert is_allocation_failure(found.value)


@on_cuda_only
@pytest.mark.parametrize("store", ["device", "host"])
def test_memory_does_not_grow_with_the_length(store: str) -> None:
    short, long = (peak_reserved(length, store=store) for length in (8_192, 65_536))
    print(f"{short / 2**20:.0f} MiB at 8k tokens, {long / 2**20:.0f} MiB at 64k")
    assert long <= short


def test_a_gradient_is_handed_over_and_not_copied() -> None:
    """Where `.grad` is None, the buffer becomes it: at no time are there three of the weights' size beside them."""
    torch.manual_seed(1)
    model = LinearAttention(width=4).to(DEVICE)
    model.head = nn.Linear(4, 1 << 21).to(DEVICE)
    inputs = torch.randint(0, 13, (1, 4), device=DEVICE)

    def tiny(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[..., :13].square().sum()

    sg.backward(model, inputs, chunk=2, loss_fn=tiny)
    if IS_CUDA:
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        sg.backward(model, inputs, chunk=2, loss_fn=tiny)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        after = torch.cuda.memory_allocated() - before
        assert after <= gradients + (2 << 20), (after, gradients)
