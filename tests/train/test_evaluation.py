"""A sequence that streams by costs the bits that it costs whole."""

from __future__ import annotations

import io
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import slimgrad as sg
from slimgrad.models import Performer
from slimgrad.train import Evaluated, evaluate_stream, read_pieces
from tests.train.settings import TEXT, TINY_MODEL

SEQUENCE = TEXT[:500]
MODEL = Performer(TINY_MODEL)


def whole() -> float:
    with torch.no_grad():
        logits, _ = MODEL.double()(SEQUENCE[None, :-1], MODEL.initial_state(1))
        loss = torch.nn.functional.cross_entropy(logits[0], SEQUENCE[1:].long(), reduction="sum")
    MODEL.float()
    return float(loss) / math.log(2)


WHOLE_BITS = whole()


@hypothesis.settings(max_examples=15)
@hypothesis.given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=12), chunk=st.integers(1, 64))
def test_the_sizes_of_the_pieces_do_not_move_the_result(sizes: list[int], chunk: int) -> None:
    sizes = [*sizes, 500]
    starts = [min(sum(sizes[:i]), 500) for i in range(len(sizes) + 1)]
    pieces = [SEQUENCE[a:b] for a, b in itertools.pairwise(starts) if b > a]
    seen: list[Evaluated] = []
    found = evaluate_stream(MODEL, pieces, chunk=chunk, report=seen.append)
    assert found.bits == pytest.approx(WHOLE_BITS, rel=1e-6)
    assert (found.predicted, found.num_bytes) == (499, 500)
    assert found.bits_per_byte == found.bits / 499
    assert [so_far.num_bytes for so_far in seen] == [stop for _, stop in zip(pieces, starts[1:], strict=False)]


def test_single_bytes_are_pieces_too() -> None:
    found = evaluate_stream(MODEL, SEQUENCE.split(1), chunk=8)
    assert found.bits == pytest.approx(WHOLE_BITS, rel=1e-6)


@pytest.mark.parametrize("pieces", [[], [b""], [b"a"]])
def test_nothing_to_predict_is_refused(pieces: list[bytes]) -> None:
    tensors = [torch.tensor(list(piece), dtype=torch.uint8) for piece in pieces]
    with pytest.raises(sg.InputError, match=r"expected at least two bytes, one to read and one to predict, got [01]"):
        evaluate_stream(MODEL, tensors, chunk=8)


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(sg.InputError, match="chunk=0: expected at least 1"):
        evaluate_stream(MODEL, [SEQUENCE], chunk=0)


def test_a_file_is_read_piece_by_piece() -> None:
    content = bytes(SEQUENCE.tolist())
    pieces = list(read_pieces(io.BytesIO(content), 64))
    assert [len(piece) for piece in pieces] == [64] * 7 + [52]
    assert bytes(torch.cat(pieces).tolist()) == content
