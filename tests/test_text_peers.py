"""What our bits per byte are compared with is itself right."""

from __future__ import annotations

import bz2
import lzma

import numpy as np
import pytest
import zstandard
from benchmarks.texts_peers import COMPRESSORS, kneser_ney_bits, train_lstm

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 3 + b"the quick fox", dtype=np.uint8).copy()


@pytest.mark.parametrize("end", [len(TEXT), 40, 7])
def test_the_n_gram_model_gives_every_byte_a_share_of_one(end: int) -> None:
    shares = [2 ** -kneser_ney_bits(TEXT[:end], np.array([byte], dtype=np.uint8)) for byte in range(256)]
    assert sum(shares) == pytest.approx(1, rel=1e-12)
    assert min(shares) > 0


def test_the_n_gram_model_knows_what_it_has_read() -> None:
    read, unread = (
        np.frombuffer(words, dtype=np.uint8) for words in (b" jumps over the lazy", b" zqvx KW!? 0123 #+*&")
    )
    assert kneser_ney_bits(TEXT, read) < 2 * len(read)
    assert kneser_ney_bits(TEXT, unread) > 7 * len(unread)


def test_an_lstm_has_about_the_size_it_is_given_and_learns() -> None:
    found = train_lstm(np.tile(TEXT, 20), TEXT, parameters=60_000, cpu_seconds=0.5, learning_rate=8e-3)
    assert abs(found["parameters"] - 60_000) < 10_000
    assert found["lowest_bits_per_byte"] <= found["bits_per_byte"] < 2  # measured: 0.12 to 0.16; the bytes alone: 4.4


def test_compressors_lose_nothing() -> None:
    undo = {"xz -9e": lzma.decompress, "bzip2 -9": bz2.decompress, "zstd --ultra -22": zstandard.decompress}
    content = TEXT.tobytes()
    for name, compress in COMPRESSORS.items():
        assert undo[name](compress(content)) == content
        assert len(compress(content)) <= len(compress(content * 2))
