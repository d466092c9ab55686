"""Nodes of autograd's graphs are no tensors, and in a loop over tokens they take more than the tensors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.budget.planning import chooser_for
from slimgrad.budget.process import malloc_bytes
from slimgrad.budget.request import Request
from slimgrad.call.arguments import DEFAULT_CHUNK, Options
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.models import Performer, PerformerConfig
from slimgrad.sweep.program import Event

pytestmark = pytest.mark.skipif(sys.platform != "linux" or malloc_bytes() is None, reason="glibc's mallinfo2 tells")
TOKENS = torch.arange(4096)[None] % 61
CHUNK, TAPE = 64, 40


class Loop(nn.Module):
    """torch's GRU, which on a CPU is a loop of small operations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(64, 32), nn.GRU(32, 32, 2, batch_first=True), nn.Linear(32, 64)

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(2, batch_size, 32)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, state = self.gru(self.embed(inputs), state)
        return self.head(hidden), state


def on_the_tape(model: nn.Module) -> int:
    """What malloc has given out when the tape is longest, beside what it had before."""
    most, before = 0, malloc_bytes() or 0

    def look(event: Event) -> None:
        nonlocal most
        most = max(most, (malloc_bytes() or 0) - before)

    sg.backward(model, TOKENS, chunk=CHUNK, schedule=sg.Rebuild(tape=TAPE), on_chunk=look)
    return most


def test_what_malloc_gave_out_is_told() -> None:
    before = malloc_bytes() or 0
    held = torch.zeros(3_000_000)
    assert 12_000_000 <= (malloc_bytes() or 0) - before <= 12_100_000
    del held


def test_a_tape_of_a_loop_is_counted_with_its_nodes() -> None:
    model = Loop()
    sg.backward(model, TOKENS, chunk=CHUNK)  # gradients and thread pools are there
    options = Options(None, DEFAULT_CHUNK, None, cross_entropy_sum, "targets", None, None)
    _, chooser = chooser_for(Request(model, TOKENS, None, options), "64GiB")
    way = chooser.way(CHUNK, sg.Rebuild(tape=TAPE))
    measured = on_the_tape(model)
    assert 0.5 * way.num_bytes <= measured <= way.num_bytes
    tensors = way.num_bytes - way.account["allocator"] - way.account["nodes of graphs"]
    assert measured > 2 * tensors  # so that an account of tensors alone would be far too small


def test_nodes_of_a_model_of_large_operations_are_few() -> None:
    model = Performer(PerformerConfig(layers=1, width=64, heads=2))
    options = Options(None, DEFAULT_CHUNK, None, cross_entropy_sum, "targets", None, None)
    _, chooser = chooser_for(Request(model, TOKENS, None, options), "64GiB")
    way = chooser.way(256, sg.Rebuild(tape=8))
    assert way.account["nodes of graphs"] <= 0.1 * way.num_bytes
