"""Splits and windows: nothing twice, nothing lost but what is said to be."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from slimgrad import InputError
from slimgrad.data import consecutive_windows, shuffled_starts, split_bytes

DATA = torch.arange(103, dtype=torch.uint8)


def test_split_shares_no_byte_and_loses_none() -> None:
    train, validation = split_bytes(DATA, validation=10, window=93)
    assert torch.equal(torch.cat([train, validation]), DATA)
    assert len(validation) == 10
    assert train.data_ptr() == DATA.data_ptr()


def test_split_of_too_little_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match=r"at least 104 bytes \(one window of 94 and 10 for validation\), got 103"):
        split_bytes(DATA, validation=10, window=94)
    with pytest.raises(InputError, match="validation=1: expected at least 2 bytes"):
        split_bytes(DATA, validation=1, window=4)


def test_consecutive_windows_follow_each_other() -> None:
    windows = list(consecutive_windows(DATA, 25))
    assert [len(window) for window in windows] == [25] * 4
    assert torch.equal(torch.cat(windows), DATA[:100])
    assert [len(window) for window in consecutive_windows(DATA, 103)] == [103]


@pytest.mark.parametrize("length", [0, 104])
def test_windows_longer_than_the_data_or_empty_are_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"length={length}: expected between 1 and the 103 bytes"):
        consecutive_windows(DATA, length)
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


def test_one_seed_gives_one_order() -> None:
    orders = [list(islice(shuffled_starts(1000, 10, torch.Generator().manual_seed(s)), 300)) for s in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
