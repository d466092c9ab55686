"""A million tokens: rolled back and kept are the same bits, and both are true to a float64 state.

Sums that had silently wrapped would agree with each other and be wrong by 1e6: hence the third comparison.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import slimgrad as sg
from tests.contract.contract import Gradients, collect, global_error, plain
from tests.toy_models import LinearAttention

LENGTH, CHUNK = 1 << 20, 4096


def model(dtype: torch.dtype, doublings: float, state_dtype: torch.dtype | None = None) -> LinearAttention:
    torch.manual_seed(6)
    return LinearAttention(width=2, doublings=doublings / LENGTH, state_dtype=state_dtype).to(dtype)


def gradients(dtype: torch.dtype, doublings: float, schedule: sg.Schedule, **options: torch.dtype) -> Gradients:
    swept = model(dtype, doublings, **options)
    result = sg.backward(swept, tokens(), chunk=CHUNK, schedule=schedule)
    return collect(swept, None, result.initial_state_grad) | {"loss": result.loss}


def tokens() -> Tensor:
    return torch.randint(0, 13, (1, LENGTH), generator=torch.Generator().manual_seed(7))


# All gradients together, as measured. Against float64 states, with all else the same: 3e-8, 4e-3, 6e-8, 1e-5, which is
# the state's own rounding, once per chunk. Against plain float64: 8e-4, 8e-3, 7e-4, 9e-3, which the float64 state does
# not better: it is the narrow arithmetic of the model over a million tokens.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "doublings", "to_wide_state", "to_truth"),
    [
        (torch.float32, 0.0, 1e-7, 2e-3),
        (torch.bfloat16, 0.0, 1e-2, 2e-2),
        (torch.float32, 60.0, 2e-7, 2e-3),
        (torch.bfloat16, 60.0, 1e-4, 2e-2),
    ],
    ids=["float32", "bfloat16", "float32 growing by 2^60", "bfloat16 growing by 2^60"],
)
def test_rebuild_equals_keep_in_every_bit(
    dtype: torch.dtype, doublings: float, to_wide_state: float, to_truth: float
) -> None:
    rebuilt = gradients(dtype, doublings, sg.Rebuild())
    kept = gradients(dtype, doublings, sg.Keep())
    assert rebuilt.keys() == kept.keys()
    for name, gradient in rebuilt.items():
        assert torch.equal(gradient, kept[name]), name
    wide = gradients(dtype, doublings, sg.Keep(), state_dtype=torch.float64)
    state = rebuilt.pop("state 0")
    assert bool(state.isfinite().all())
    wide.pop("state 0")
    exact = model(dtype, doublings).double()
    truth = plain(exact, tokens(), None)[1]
    truth.pop("state 0")
    del rebuilt["loss"], wide["loss"]
    assert global_error(rebuilt, wide) <= to_wide_state
    assert global_error(rebuilt, truth) <= to_truth
