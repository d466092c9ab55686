"""Windows: none twice in a pass, nothing left out but what is said to be."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from slimgrad import InputError
from slimgrad.data import Documents, consecutive_starts, shuffled_starts

DATA = torch.arange(103, dtype=torch.uint8)
TEXT = Documents([DATA[:40], DATA[40:41], DATA[41:]])


def test_consecutive_windows_follow_each_other_across_documents() -> None:
    windows = [TEXT.read(start, start + 25) for start in consecutive_starts(len(TEXT), 25)]
    assert torch.equal(torch.cat(windows), DATA[:100])
    assert list(consecutive_starts(103, 103)) == [0]


@pytest.mark.parametrize("length", [0, 104])
def test_windows_longer_than_the_data_or_empty_are_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"length={length}: expected between 1 and the 103 bytes"):
        consecutive_starts(103, length)
    with pytest.raises(InputError, match=f"length={length}: expected between 1 and the 103 bytes"):
        next(shuffled_starts(103, length, torch.Generator()))


@pytest.mark.parametrize("length", [1, 7, 52, 102, 103])
def test_each_pass_takes_windows_that_do_not_overlap(length: int) -> None:
    starts = shuffled_starts(103, length, torch.Generator().manual_seed(1))
    for _ in range(5):
        first = next(starts)
        offset = first % length
        count = (103 - offset) // length
        taken = sorted([first, *islice(starts, count - 1)])
        assert taken == [offset + i * length for i in range(count)]


def test_passes_begin_at_different_offsets() -> None:
    starts = shuffled_starts(103, 10, torch.Generator().manual_seed(1))
    assert len({start % 10 for start in islice(starts, 500)}) == 10


def test_one_seed_gives_one_order() -> None:
    orders = [list(islice(shuffled_starts(1000, 10, torch.Generator().manual_seed(s)), 300)) for s in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
