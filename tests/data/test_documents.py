"""Documents: read and cut like the one sequence of bytes that they stand for, and copied only across an edge."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimgrad import InputError
from slimgrad.data import Documents, FileBytes

PARTS = st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=6)


def as_tensor(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def documents(parts: list[bytes]) -> Documents:
    return Documents(as_tensor(part) for part in parts)


def as_bytes(data: Tensor) -> bytes:
    assert data.dtype == torch.uint8
    return bytes(data.tolist())


@given(PARTS, st.data())
def test_read_is_a_slice_of_the_concatenation(parts: list[bytes], data: st.DataObject) -> None:
    whole, text = b"".join(parts), documents(parts)
    assert len(text) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert as_bytes(text.read(start, stop)) == whole[start:stop]


@given(PARTS, st.data())
def test_files_are_read_and_cut_as_tensors_are(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(number)) for number in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            path.write_bytes(b"before" + part + b"after")
        text = Documents(FileBytes(path, 6, 6 + len(part)) for path, part in zip(paths, parts, strict=True))
        found = [text]
        if len(whole) > 1:
            found = list(text.cut(data.draw(st.integers(1, len(whole) - 1))))
        assert b"".join(as_bytes(one.read(0, len(one))) for one in found) == whole
        start = data.draw(st.integers(0, len(found[-1])))
        stop = data.draw(st.integers(start, len(found[-1])))
        offset = len(whole) - len(found[-1])
        assert as_bytes(found[-1].read(start, stop)) == whole[offset + start : offset + stop]
        assert b"".join(map(as_bytes, text.pieces(0, len(text), 4))) == whole


@given(PARTS, st.data())
def test_cut_loses_no_byte_and_no_edge(parts: list[bytes], data: st.DataObject) -> None:
    whole, text = b"".join(parts), documents([*parts, b"x"])
    at = data.draw(st.integers(1, len(whole)))
    before, after = text.cut(at)
    assert as_bytes(before.read(0, len(before))) == whole[:at]
    assert as_bytes(after.read(0, len(after))) == (whole + b"x")[at:]
    edges = set(torch.tensor([len(part) for part in parts]).cumsum(0).tolist())
    found = set(torch.tensor([len(document) for document in before.documents]).cumsum(0).tolist())
    found |= {at} | {at + end for end in torch.tensor([len(x) for x in after.documents]).cumsum(0).tolist()}
    assert found == edges | {at, len(text)}


def test_what_one_document_holds_is_not_copied() -> None:
    parts = [torch.arange(10, dtype=torch.uint8), torch.arange(7, dtype=torch.uint8)]
    text = Documents(parts)
    assert text.read(2, 10).data_ptr() == parts[0].data_ptr() + 2
    assert text.read(10, 17).data_ptr() == parts[1].data_ptr()
    before, after = text.cut(12)
    assert [x.data_ptr() for x in before.documents if isinstance(x, Tensor)] == [
        parts[0].data_ptr(),
        parts[1].data_ptr(),
    ]
    assert after.read(0, 5).data_ptr() == parts[1].data_ptr() + 2


@pytest.mark.parametrize("length", [1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_checksum_is_that_of_the_concatenation(length: int) -> None:
    parts = [b"before", bytes(range(251)) * (length // 251) + bytes(length % 251), b"after"]
    assert documents(parts).sha256() == hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("parts", [[], [b""], [b"a", b"", b"b"]])
def test_no_document_or_an_empty_one_is_refused(parts: list[bytes]) -> None:
    with pytest.raises(InputError, match="expected at least one document, and none that is empty"):
        documents(parts)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_reading_outside_is_refused(start: int, stop: int) -> None:
    with pytest.raises(InputError, match=f"expected 0 <= start <= stop <= 5, got {start} and {stop}"):
        documents([b"abc", b"de"]).read(start, stop)


@pytest.mark.parametrize("at", [-1, 0, 5, 6])
def test_a_cut_that_leaves_one_side_empty_is_refused(at: int) -> None:
    with pytest.raises(InputError, match=f"expected a cut within the 5 bytes, got {at}"):
        documents([b"abc", b"de"]).cut(at)
