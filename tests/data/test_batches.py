"""Batches: each order as it is described, the same from any batch on, and from one seed."""

from __future__ import annotations

from itertools import islice
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slimgrad
from slimgrad import InputError
from slimgrad.data import Batch, Documents, Order, Windows, copying_batches, documents, text_batches, whole

DATA = torch.arange(103, dtype=torch.uint8)  # every byte is its own place
TEXT = Documents([DATA[:3], DATA[3:4], DATA[4:41], DATA[41:]])
ORDERS: tuple[Order, ...] = get_args(Order)


def plain(batch: Batch) -> list[list[list[int]]]:
    return [whole(sequence).tolist() for sequence in batch.sequences]


@given(
    order=st.sampled_from(ORDERS),
    lengths=st.lists(st.integers(1, 103), min_size=1, max_size=12),
    batch=st.integers(1, 5),
    seed=st.integers(0, 1 << 40),
    data=st.data(),
)
def test_from_any_batch_on_is_the_rest_of_the_whole(
    order: Order, lengths: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(lengths)))
    whole = list(text_batches(TEXT, lengths, batch=batch, order=order, seed=seed))
    rest = list(text_batches(TEXT, lengths, batch=batch, order=order, seed=seed, first=first))
    assert len(whole) == len(lengths)
    assert list(map(plain, rest)) == list(map(plain, islice(whole, first, None)))


@given(order=st.sampled_from(["shuffled", "consecutive", "random"]), lengths=st.lists(st.integers(1, 103), max_size=9))
def test_windows_are_of_the_lengths_asked_for_and_lie_in_the_text(order: Order, lengths: list[int]) -> None:
    for length, batch in zip(lengths, text_batches(TEXT, lengths, batch=3, order=order, seed=0), strict=True):
        assert isinstance(batch.inputs, torch.Tensor)
        assert (batch.inputs.dtype, tuple(batch.inputs.shape)) == (torch.uint8, (3, length))
        assert (batch.num_bytes, batch.longest, batch.num_targets) == (3 * length, length, 3 * (length - 1))
        for row in batch.inputs.tolist():
            assert row == list(range(row[0], row[0] + length))


@pytest.mark.parametrize("order", ["shuffled", "random", "documents"])
def test_one_seed_gives_one_order(order: Order) -> None:
    text = Documents([DATA[i : i + 2] for i in range(100)])
    runs = [[plain(x) for x in text_batches(text, [2] * 60, batch=1, order=order, seed=s)] for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_shuffled_takes_each_window_once_a_pass_across_batches() -> None:
    batches = text_batches(TEXT, [10] * 50, batch=2, order="shuffled", seed=5)
    starts = [row[0] for batch in batches for row in plain(batch)[0]]
    passes = 0
    while len(starts) >= 10:
        offset = starts[0] % 10
        count = (103 - offset) // 10
        assert sorted(starts[:count]) == [offset + 10 * i for i in range(count)]
        starts, passes = starts[count:], passes + 1
    assert passes >= 9


def test_consecutive_goes_through_the_text_and_begins_again() -> None:
    batches = text_batches(TEXT, [25] * 6, batch=1, order="consecutive", seed=0)
    assert [plain(batch)[0][0][0] for batch in batches] == [0, 25, 50, 75, 0, 25]
    whole = text_batches(TEXT, [103] * 2, batch=1, order="consecutive", seed=0)
    assert [plain(batch)[0][0][0] for batch in whole] == [0, 0]
    fitting = text_batches(TEXT, [50, 53, 3], batch=1, order="consecutive", seed=0)
    assert [plain(batch)[0][0][0] for batch in fitting] == [0, 50, 0]
    growing = text_batches(TEXT, [40, 60, 4, 3, 1], batch=1, order="consecutive", seed=0)
    assert [plain(batch)[0][0][0] for batch in growing] == [0, 40, 0, 4, 7]  # 3 bytes are left for 4


def test_random_starts_anywhere_and_everywhere() -> None:
    batches = text_batches(TEXT, [100] * 200, batch=1, order="random", seed=0)
    assert {plain(batch)[0][0][0] for batch in batches} == {0, 1, 2, 3}


@given(batch=st.integers(1, 7), seed=st.integers(0, 99))
def test_documents_come_once_a_pass_at_their_own_length(batch: int, seed: int) -> None:
    wanted = [[list(range(3))], [list(range(4, 41))], [list(range(41, 103))]]  # the one of a single byte is left out
    batches = list(text_batches(TEXT, [1] * 9, batch=batch, order="documents", seed=seed))
    assert all(len(x.sequences) == batch and x.targets is None for x in batches)
    taken = [document for x in batches for document in plain(x)]
    for i in range(0, len(taken) - 2, 3):
        assert sorted(taken[i : i + 3]) == wanted
    lengths = [[len(document[0]) for document in plain(x)] for x in batches]
    assert [x.longest for x in batches] == [max(each) for each in lengths]
    assert [x.num_bytes for x in batches] == [sum(each) for each in lengths]
    assert [x.num_targets for x in batches] == [sum(each) - batch for each in lengths]


def test_passes_over_documents_differ() -> None:
    text = Documents([DATA[i : i + 2] for i in range(20)])
    taken = [plain(x)[0] for x in text_batches(text, [1] * 40, batch=1, order="documents", seed=0)]
    assert sorted(taken[:20]) == sorted(taken[20:])
    assert taken[:20] != taken[20:]


def test_one_window_stays_a_view_of_its_document() -> None:
    for order in ORDERS:
        (one,) = next(text_batches(Documents([DATA]), [103], batch=1, order=order, seed=0)).sequences
        assert isinstance(one, torch.Tensor)
        assert one.data_ptr() == DATA.data_ptr()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_long_sequences_are_read_as_they_are_used(order: Order, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those that small ones would be, span by span."""

    def some() -> Batch:
        return list(text_batches(TEXT, [60] * 3, batch=batch, order=order, seed=2))[-1]

    expected = some()
    monkeypatch.setattr(documents, "AT_ONCE", 2)
    found = some()
    for one, tensor in zip(found.sequences, expected.sequences, strict=True):
        assert isinstance(one, Windows)
        assert isinstance(one, slimgrad.Reader)
        assert isinstance(tensor, torch.Tensor)
        assert (one.batch, one.length) == tensor.shape
        for start, stop in ((0, 1), (1, 3), (0, one.length), (one.length - 1, one.length)):
            assert torch.equal(one.read(start, stop), tensor[:, start:stop])
    assert (found.shapes, found.num_bytes, found.longest) == (expected.shapes, expected.num_bytes, expected.longest)
    assert found.num_targets == expected.num_targets


def test_a_text_that_is_too_short_is_refused() -> None:
    for order in ("shuffled", "consecutive", "random"):
        with pytest.raises(InputError, match="length=104: expected between 1 and the 103 bytes there are"):
            list(text_batches(TEXT, [103, 104], batch=1, order=order, seed=0))
    with pytest.raises(InputError, match=r"expected a document of at least two bytes, .* found none"):
        list(text_batches(Documents([DATA[:1], DATA[1:2]]), [5], batch=1, order="documents", seed=0))


@given(half=st.integers(2, 20), batch=st.integers(1, 4), seed=st.integers(-1, 1 << 40))
def test_copying_says_a_word_twice_and_asks_for_the_second(half: int, batch: int, seed: int) -> None:
    for x in copying_batches(2 * half, 3, batch=batch, seed=seed):
        assert isinstance(x.inputs, torch.Tensor)
        assert isinstance(x.targets, torch.Tensor)
        assert (x.inputs.dtype, x.targets.dtype) == (torch.uint8, torch.int64)
        assert x.num_targets == batch * half
        for row, targets in zip(x.inputs.tolist(), x.targets.tolist(), strict=True):
            assert row[:half] == row[half:]
            assert row[0] == 0
            assert min(row[1:half]) > 0
            # position p predicts p + 1: the first that counts is the last of the first half
            assert targets == [-100] * (half - 1) + row[half:] + [-100]


def test_copying_words_are_spread_over_all_symbols() -> None:
    batch = next(copying_batches(2002, 1, batch=8, seed=0))
    assert isinstance(batch.inputs, torch.Tensor)
    assert torch.equal(batch.inputs[:, 1:1001].unique(), torch.arange(1, 256, dtype=torch.uint8))


@given(steps=st.integers(0, 6), batch=st.integers(1, 3), seed=st.integers(0, 9), data=st.data())
def test_copying_from_any_batch_on_is_the_rest(steps: int, batch: int, seed: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, steps))
    whole = [plain(x) for x in copying_batches(12, steps, batch=batch, seed=seed)]
    assert [plain(x) for x in copying_batches(12, steps, batch=batch, seed=seed, first=first)] == whole[first:]
    assert len(whole) == steps


def test_copying_words_differ_between_batches_and_seeds() -> None:
    runs = [[plain(x) for x in copying_batches(32, 9, batch=1, seed=s)] for s in (3, 3, 4, -1)]
    assert runs[0] == runs[1]
    words = [str(word) for run in runs[1:] for word in run]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("length", [0, 2, 7])
def test_copying_needs_two_equal_halves(length: int) -> None:
    with pytest.raises(InputError, match=f"length={length}: expected an even number of at least 4"):
        next(copying_batches(length, 1, batch=1, seed=0))
