"""Corpora: bytes as they are, read where they lie; one clear error for each thing a file can lack."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slimgrad import InputError
from slimgrad.data import load_corpus, map_file, pydocs


def test_mapped_file_holds_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "all.bin"
    path.write_bytes(bytes(range(256)) * 3)
    data = map_file(path)
    assert data.dtype == torch.uint8
    assert bytes(data.tolist()) == path.read_bytes()


def test_read_only_file_maps_and_is_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc")
    path.chmod(0o444)
    map_file(str(path))[0] = 0
    assert path.read_bytes() == b"abc"


def test_missing_file_directory_and_empty_file_say_what_came(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, came in {
        tmp_path / "absent": "found nothing of that name",
        tmp_path: "found a directory",
        tmp_path / "empty": "the file is empty",
    }.items():
        with pytest.raises(InputError, match=f"{re.escape(str(path))}: expected .*{came}"):
            map_file(path)


def test_pydocs_is_the_sorted_topics() -> None:
    from pydoc_data.topics import topics

    text = bytes(pydocs().tolist())
    assert len(text) > 100_000
    assert text.startswith(topics[min(topics)].encode())
    assert text.endswith(topics[max(topics)].encode())
    assert len(text) == sum(len(topic.encode()) for topic in topics.values())


def test_corpus_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "my book.txt"
    path.write_bytes(b"abc")
    corpus = load_corpus(path)
    assert (corpus.name, corpus.source, len(corpus.data)) == ("my book", str(path), 3)
    assert load_corpus().name == "pydocs"
