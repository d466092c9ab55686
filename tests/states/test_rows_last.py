"""`Growing.append(rows, last=)`: the last rows alone, with the gradient of all."""

from __future__ import annotations

import pytest
import torch

import slimgrad as sg
from slimgrad.models import Cached
from slimgrad.states.rows import RowsCarrier


def test_fewer_rows_than_new_ones_are_refused() -> None:
    state = sg.Growing(torch.zeros(1, 0, 2))
    with pytest.raises(sg.ModelError, match=r"last=2: expected at least the 3 new rows"):
        state.append(torch.zeros(1, 3, 2), last=2)


def test_outside_of_a_sweep_it_gives_the_last_rows() -> None:
    rows = torch.arange(5.0)[None, :, None]
    _, state = sg.Growing(torch.zeros(1, 0, 1)).append(rows[:, :3])
    last, state = state.append(rows[:, 3:], last=3)
    assert last.flatten().tolist() == [2, 3, 4]
    assert state.value.flatten().tolist() == [0, 1, 2, 3, 4]


def test_the_value_after_it_is_refused_by_name() -> None:
    class Reads(Cached):
        def forward(self, inputs: torch.Tensor, state: sg.Growing) -> tuple[torch.Tensor, sg.Growing]:
            outputs, following = super().forward(inputs, state)
            return outputs + following.value.sum(), following

    tokens = torch.randint(0, 256, (1, 12))
    with pytest.raises(sg.ModelError, match=r"value of a Growing was read after append\(\.\.\., last=6\)"):
        sg.backward(Reads(width=4, window=3), tokens, chunk=4)


def test_a_chunk_reads_its_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[int] = []
    rows = RowsCarrier.rows

    def noted(self: RowsCarrier, first: int, stop: int) -> torch.Tensor:
        longest.append(stop - first)
        return rows(self, first, stop)

    monkeypatch.setattr(RowsCarrier, "rows", noted)
    sg.backward(Cached(width=4, window=8), torch.randint(0, 256, (1, 64)), chunk=16)
    assert sorted(set(longest)) == [16, 8 - 1 + 16, 64]
    assert longest.count(64) == 1  # the final state
