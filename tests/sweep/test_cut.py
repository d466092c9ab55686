"""Chunks are a partition of the time axis, found by number without being held."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimgrad.sweep.cut import Cut, Span

cuts = st.builds(Cut, st.integers(1, 400), st.integers(1, 500))


@given(cuts)
def test_chunks_follow_one_another_from_the_first_token_to_the_last(cut: Cut) -> None:
    chunks = [cut[number] for number in range(len(cut))]
    assert chunks[0].start == 0
    assert chunks[-1].stop == cut.length
    assert all(left.stop == right.start for left, right in pairwise(chunks))


@given(cuts)
def test_all_but_the_last_chunk_have_the_length_that_was_asked_for(cut: Cut) -> None:
    *others, last = [stop - start for start, stop in (cut[number] for number in range(len(cut)))]
    assert others == [cut.chunk] * len(others)
    assert 1 <= last <= cut.chunk + 1


@given(cuts)
def test_a_remainder_of_one_token_joins_the_chunk_before_it(cut: Cut) -> None:
    lengths = {stop - start for start, stop in (cut[number] for number in range(len(cut)))}
    assert (1 in lengths) == (cut.chunk == 1 or cut.length == 1)


@pytest.mark.parametrize(
    ("length", "chunk", "expected"),
    [
        (12, 4, [(0, 4), (4, 8), (8, 12)]),
        (13, 4, [(0, 4), (4, 8), (8, 13)]),
        (14, 4, [(0, 4), (4, 8), (8, 12), (12, 14)]),
        (5, 4, [(0, 5)]),
        (3, 4, [(0, 3)]),
        (1, 4, [(0, 1)]),
        (3, 2, [(0, 3)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
        (1, 1, [(0, 1)]),
    ],
)
def test_by_hand(length: int, chunk: int, expected: list[tuple[int, int]]) -> None:
    cut = Cut(length, chunk)
    assert [tuple(cut[number]) for number in range(len(cut))] == expected


@given(cuts, st.integers(-3, 600))
def test_a_number_that_no_chunk_has(cut: Cut, number: int) -> None:
    if 0 <= number < len(cut):
        assert cut[number].stop > cut[number].start
    else:
        with pytest.raises(IndexError, match=f"chunk {number} of {len(cut)}"):
            cut[number]


def test_a_cut_of_any_length_is_two_numbers() -> None:
    tracemalloc.start()
    cut = Cut(10**12 + 1, 4096)
    last = cut[len(cut) - 1]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last == (10**12 // 4096 * 4096 - 4096 * (10**12 % 4096 == 0), 10**12 + 1)
    assert held < 2000  # measured 350: a cut, a span and their numbers


@given(st.integers(0, 1000), st.integers(1, 300), st.data())
def test_pieces_are_a_partition_into_about_equal_lengths(start: int, length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, length))
    pieces = Span(start, start + length).pieces(count)
    assert len(pieces) == count
    assert (pieces[0].start, pieces[-1].stop) == (start, start + length)
    assert all(left.stop == right.start for left, right in pairwise(pieces))
    lengths = [stop - start for start, stop in pieces]
    assert max(lengths) - min(lengths) <= 1


def test_a_span_says_which_tokens() -> None:
    assert str(Span(64, 128)) == "tokens 64 to 127"
    assert str(Span(7, 8)) == "tokens 7 to 7"
