"""A sequence that streams by costs the bits that it costs whole."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import slimgrad as sg
from slimgrad.bytelm import Evaluated, evaluate_stream, read_pieces
from slimgrad.models import Performer
from tests.bytelm.settings import TEXT, TINY_MODEL

SEQUENCE = TEXT[:300]
torch.manual_seed(0)
MODEL = Performer(TINY_MODEL)


def whole_bits(sequence: torch.Tensor) -> float:
    """In float64, in one piece."""
    model = copy.deepcopy(MODEL).double()
    with torch.no_grad():
        logits, _ = model(sequence[None, :-1], model.initial_state(1))
        loss = torch.nn.functional.cross_entropy(logits[0], sequence[1:].long(), reduction="sum")
    return float(loss) / math.log(2)


WHOLE_BITS = whole_bits(SEQUENCE)


@hypothesis.settings(max_examples=15)
@hypothesis.given(sizes=st.lists(st.integers(1, 120), min_size=1, max_size=12), chunk=st.integers(3, 64))
def test_the_sizes_of_the_pieces_do_not_move_the_result(sizes: list[int], chunk: int) -> None:
    sizes = [*sizes, 300]
    starts = [min(sum(sizes[:i]), 300) for i in range(len(sizes) + 1)]
    pieces = [SEQUENCE[a:b] for a, b in itertools.pairwise(starts) if b > a]
    seen: list[Evaluated] = []
    found = evaluate_stream(MODEL, pieces, chunk=chunk, report=seen.append)
    assert found.bits == pytest.approx(WHOLE_BITS, rel=2e-7)  # measured: 2.3e-8
    assert (found.predicted, found.num_bytes) == (299, 300)
    assert found.bits_per_byte == found.bits / 299
    assert [so_far.num_bytes for so_far in seen] == [stop for _, stop in zip(pieces, starts[1:], strict=False)]


def test_single_bytes_are_pieces_too() -> None:
    found = evaluate_stream(MODEL, SEQUENCE[:100].split(1), chunk=8)
    assert found.bits == pytest.approx(whole_bits(SEQUENCE[:100]), rel=2e-7)  # measured: 1.3e-9


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
    assert [len(piece) for piece in pieces] == [64] * 4 + [44]
    assert bytes(torch.cat(pieces).tolist()) == content


def test_a_pipe_that_delivers_in_drips_is_read_to_its_end() -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb", buffering=0) as file:
            for drip in SEQUENCE[:100].split(9):
                file.write(bytes(drip.tolist()))

    writer = threading.Thread(target=write)
    writer.start()
    with open(reading, "rb") as file:
        pieces = list(read_pieces(file, 32))
    writer.join()
    assert [len(piece) for piece in pieces] == [32, 32, 32, 4]
    assert torch.equal(torch.cat(pieces), SEQUENCE[:100])
