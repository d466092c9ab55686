"""From files to documents: compressed ones, FASTA, JSON lines; what is damaged or of another format is refused."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from slimgrad import InputError
from slimgrad.data import Reading, load_corpus, reading
from slimgrad.data.reading import _lines, read_documents  # pyright: ignore[reportPrivateUsage]

TEXT = b"the quick brown fox\n" * 5000
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstandard": zstandard.ZstdCompressor(level=19).compress,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SLIMGRAD_DATA", str(folder))
    return folder


def contents(path: Path, how: Reading | None = None) -> list[bytes]:
    return [document.read().numpy().tobytes() for document in read_documents(path, how or Reading())]


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_compressed_text_is_decompressed_once_and_said(
    kind: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_bytes(COMPRESS[kind](TEXT))
    assert contents(path) == [TEXT]
    (made,) = cache.glob("*.documents")
    assert f"{path}: text of {len(TEXT):,} bytes from it, kept in {made}" in caplog.text

    caplog.clear()
    monkeypatch.setattr(reading, "_write", lambda *_: pytest.fail("made twice"))
    assert contents(path) == [TEXT]
    assert not caplog.text


@pytest.mark.parametrize("kind", COMPRESS)
def test_parts_one_after_the_other_are_all_read(kind: str, tmp_path: Path) -> None:
    """Streams and frames may be concatenated: `cat a.gz b.gz`, and what compresses in several threads writes them."""
    path = tmp_path / "text"
    path.write_bytes(COMPRESS[kind](TEXT) + COMPRESS[kind](b"and more"))
    assert contents(path) == [TEXT + b"and more"]


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("how", ["cut off", "flipped"])
def test_a_damaged_file_is_refused_and_leaves_nothing(kind: str, how: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "text"
    noise = os.urandom(5000)
    content = bytearray(COMPRESS[kind](noise))
    if how == "flipped":
        content[len(content) // 2] ^= 255
        if kind == "zstandard":  # without a checksum of its own, random bytes in another order are as good: its head
            content[4] ^= 255
    else:
        del content[-9:]
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: expected a whole file that is compressed by {kind}, got: "):
        contents(path)
    assert not [one for one in cache.iterdir() if not one.name.endswith(".lock")]


def test_a_damaged_cache_is_made_anew(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(gzip.compress(TEXT))
    assert contents(path) == [TEXT]
    (made,) = cache.glob("*.documents")
    made.write_bytes(TEXT[:-1] + b"!")
    assert contents(path) == [TEXT]
    (record,) = cache.glob("*.json")
    record.write_text("{}")
    assert contents(path) == [TEXT]


def test_another_file_of_the_same_name_is_not_taken_for_the_former(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for text in (b"first", b"other"):
        path.write_bytes(gzip.compress(text))
        assert contents(path) == [text]


def test_a_full_disk_is_not_called_damage(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(gzip.compress(TEXT))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(TEXT) // 2, before[1]))
    try:
        with pytest.raises(InputError, match=r"/cache/.*: expected a cache to write to, got: File too large"):
            contents(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(path) == [TEXT]


def test_a_folder_that_cannot_be_written_to_is_called_the_cache(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(gzip.compress(TEXT))
    cache.write_text("a file")
    with pytest.raises(InputError, match=r"/cache/.*: expected a cache to write to, got: File exists"):
        contents(path)


@pytest.mark.parametrize("kind", [*COMPRESS, "jsonl"])
def test_a_text_that_vanishes_is_named_and_not_the_cache(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_bytes(json.dumps({"text": "lines"}).encode() if kind == "jsonl" else COMPRESS[kind](TEXT))
    digest = reading.sha256_of(path)
    monkeypatch.setattr(reading, "sha256_of", lambda _: (path.unlink(), digest)[1])
    with pytest.raises(InputError, match=rf"^{path}: expected a readable file, got: No such file or directory\. "):
        contents(path, Reading(format="jsonl") if kind == "jsonl" else None)


@pytest.mark.parametrize("kind", ["gzip", "zstandard"])
def test_a_text_that_cannot_be_read_to_its_end_is_named(
    kind: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_bytes(COMPRESS[kind](TEXT))

    def failing(*_: object) -> Iterator[bytes]:
        yield TEXT
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reading, "_decompressed", failing)
    with pytest.raises(InputError, match=f"^{path}: expected a readable file, got: Input/output error"):
        contents(path)
    assert not [one for one in cache.iterdir() if not one.name.endswith(".lock")]


def test_fasta_gives_the_records_without_headers_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "genes.fa"
    path.write_bytes(b";a comment\n>one some words\r\nACGT\r\nacgt  \n\n>nothing\n>two\nNN\n;another\nnn*")
    assert contents(path, Reading(format="fasta")) == [b"ACGTacgt", b"NNnn*"]
    assert contents(path, Reading(format="fasta", fold_case=True)) == [b"ACGTACGT", b"NNNN*"]
    path.write_bytes(lzma.compress(path.read_bytes()))
    assert contents(path, Reading(format="fasta")) == [b"ACGTacgt", b"NNnn*"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ACGT\n>one\nACGT\n", r"expected FASTA, with a header that begins with > .* found b'ACGT' in line 1"),
        (b"\n\n>one\n>two\n", "expected a record with a sequence, found none"),
    ],
)
def test_what_is_no_fasta_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "genes.fa"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: {message}"):
        contents(path, Reading(format="fasta"))


def test_json_lines_give_one_field(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = [{"text": "one\nline", "id": 3, "body": "x"}, {"text": "é \U0001f600", "body": ""}]
    rows.append({"text": "", "body": "z"})
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert contents(path, Reading(format="jsonl")) == [b"one\nline", "é \U0001f600".encode()]
    assert contents(path, Reading(format="jsonl", field="body")) == [b"x", b"z"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnothing\n', r"expected JSON lines, found in line 2 what is none \(.*Name the format"),
        (b'{"text": "a"}\n["b"]', "expected text in the field 'text' of every line, found none in line 2.*no fields"),
        (b'{"body": "a", "id": 1}', r"found none in line 1, which has 'body', 'id'\. Name the field: --field NAME"),
        (b'{"text": [1]}', "expected text in the field 'text' of every line"),
        (b'{"text": ""}\n', "expected a document with something in it, found none"),
    ],
)
def test_what_are_no_json_lines_of_that_field_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        contents(path, Reading(format="jsonl"))


def test_a_folder_of_records_is_one_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "genomes"
    folder.mkdir()
    (folder / "a.fa").write_bytes(b">1\nAC\n>2\nGT\n")
    (folder / "b.fa.gz").write_bytes(gzip.compress(b">3\nNN\n"))
    text = load_corpus(folder, reading=Reading(format="fasta")).text
    assert text.spans == [(0, 2), (2, 4), (4, 6)]
    assert text.read(0, 6).numpy().tobytes() == b"ACGTNN"


def test_formats_that_there_are_not_are_refused() -> None:
    with pytest.raises(InputError, match="format='csv': expected one of bytes, fasta, jsonl"):
        Reading(format="csv")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="fold_case: expected format=fasta, got bytes"):
        Reading(fold_case=True)
    with pytest.raises(InputError, match="format=fasta: expected files that are read, pydocs is a corpus"):
        load_corpus(reading=Reading(format="fasta"))


def test_what_looks_like_another_format_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content, words in (
        ("genes.fasta", b">one\nACGT\n", "looks like FASTA: its bytes are taken as they are. --format fasta"),
        ("lines.jsonl", b'{"text": "a"}\n', "looks like JSON lines: .* --format jsonl --field NAME"),
        ("files.tar.gz", gzip.compress(b"\0" * 257 + b"ustar  \0" + b"\0" * 300), "looks like a tar archive"),
        ("genes.fa.xz", lzma.compress(b">one\nACGT\n"), "looks like FASTA"),
        ("text", b"\xef\xbb\xbfwords", "looks like UTF-8 text that begins with a byte order mark"),
        ("table", b"PAR1....", "looks like a parquet table"),
        ("page", b"%PDF-1.7", "looks like a PDF"),
    ):
        caplog.clear()
        path = tmp_path / name
        path.write_bytes(content)
        assert len(contents(path)) == 1
        assert any(str(path) in message for message in caplog.messages)
        assert re.search(words, caplog.text), (name, caplog.text)


@given(st.lists(st.binary(max_size=9).map(lambda x: x.replace(b"\r", b"")), max_size=9))
def test_lines_do_not_depend_on_how_the_bytes_come(pieces: list[bytes]) -> None:
    whole = b"".join(pieces).split(b"\n")
    assert list(_lines(iter(pieces))) == (whole if whole[-1] else whole[:-1])
