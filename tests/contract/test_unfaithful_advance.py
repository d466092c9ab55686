"""A model whose `advance` does not do what its `forward` does is stopped, whatever the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimgrad as sg
from tests.toy_models import CachedAttention, LinearAttention

SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


class ForgetsSums(LinearAttention):
    """Leaves its sums at zero in the forward sweep: a checksum of zero agrees with one of zero."""

    def advance(self, inputs: torch.Tensor, state: Any) -> Any:
        return state


class ForgetsRows(CachedAttention):
    def advance(self, inputs: torch.Tensor, state: Any) -> Any:
        return state


class AddsTooMuch(LinearAttention):
    def advance(self, inputs: torch.Tensor, state: Any) -> Any:
        return self(torch.cat([inputs, inputs[:, -1:]], 1), state)[1]


@every_schedule
@pytest.mark.parametrize("model_type", [ForgetsSums, ForgetsRows, AddsTooMuch])
@pytest.mark.parametrize("chunk", [9, 28, 30, 38])  # 40 tokens: the last chunk is shorter, and may be one of two
def test_is_stopped(model_type: type[torch.nn.Module], schedule: sg.Schedule, chunk: int) -> None:
    with pytest.raises(sg.StateMismatchError, match="other bits"):
        sg.backward(model_type(), torch.randint(0, 13, (2, 40)), chunk=chunk, schedule=schedule)
