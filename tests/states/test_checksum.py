"""Checksums: what changes them, and what they do not see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimgrad.states.checksum import checksum

CHECKED = {torch.float32: 32, torch.float64: 64, torch.bfloat16: 16, torch.int64: 64, torch.int32: 32, torch.uint8: 8}
INTEGER = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@given(data=st.data())
def test_a_checksum_sees_any_change_of_one_element(dtype: torch.dtype, data: st.DataObject) -> None:
    width = CHECKED[dtype]
    low, high = (0, 255) if width == 8 else (-(1 << (width - 1)), (1 << (width - 1)) - 1)
    pattern = st.integers(low, high) | st.sampled_from([0, 1, low, high, low + 1, high - 1, -1 if low else 7])
    before = data.draw(st.lists(pattern, min_size=1, max_size=20))
    place, changed = data.draw(st.integers(0, len(before) - 1)), data.draw(pattern)
    after = [*before[:place], changed, *before[place + 1 :]]
    x, y = (torch.tensor(bits, dtype=INTEGER[width]).view(dtype) for bits in (before, after))
    assert (int(checksum(x)) != int(checksum(y))) == (before[place] != changed)
    assert int(checksum(x)) == int(checksum(x.clone()))


@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@given(data=st.data())
def test_a_checksum_sees_a_swap(dtype: torch.dtype, data: st.DataObject) -> None:
    """Of the numbers that states hold: small integers, powers of two, a number and its negative."""
    numbers = [0, 1, 2, 3, 64, 100] if dtype == torch.uint8 else [0, 1, -1, 2, -2, 0.5, 3, 64, 2**20, -100]
    a, b = data.draw(st.permutations(numbers))[:2]
    size = 5000
    i, j = data.draw(st.sets(st.sampled_from([0, 1, 2, 3, 7, 64, 1024, 2048, 4096, 4999]), min_size=2, max_size=2))
    x = torch.zeros(size, dtype=dtype)
    x[i], x[j] = a, b
    swapped = x.clone()
    swapped[i], swapped[j] = b, a
    if not torch.equal(x, swapped):
        assert int(checksum(x)) != int(checksum(swapped))


def test_a_checksum_tells_zeros_and_nans_apart_and_knows_no_layout() -> None:
    assert int(checksum(torch.tensor([0.0]))) != int(checksum(torch.tensor([-0.0])))
    nan = torch.tensor([float("nan"), 1.0])
    assert int(checksum(nan)) == int(checksum(nan.clone()))
    x = torch.rand(6, 4)
    assert int(checksum(x.t())) == int(checksum(x.t().contiguous()))
    assert int(checksum(torch.empty(0))) == 0
    assert int(checksum(torch.tensor([True, False]))) != int(checksum(torch.tensor([False, True])))
    z = torch.complex(torch.rand(3), torch.rand(3))
    assert int(checksum(z)) != int(checksum(z.conj().resolve_conj()))


def test_a_checksum_goes_on_over_its_pieces() -> None:
    x = torch.zeros((1 << 18) * 2 + 3, dtype=torch.int32)
    seen = set()
    for place in (0, 1 << 18, (1 << 18) + 1, 1 << 19, (1 << 19) + 2):
        y = x.clone()
        y[place] = 1
        seen.add(int(checksum(y)))
    assert len(seen) == 5
