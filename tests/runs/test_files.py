"""A file is its old content or its new one, whatever refuses to be written."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from slimgrad import StorageError
from slimgrad.runs.files import sha256, write_atomically


@pytest.mark.parametrize("name", ["write_bytes", "replace"])
def test_a_refusal_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "config.json"
    write_atomically(path, b"old")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(StorageError, match=r"config\.json: expected to write it, got: No space left on device\. Free"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        write_atomically(tmp_path / "gone" / "config.json", b"new")


def test_a_checksum_is_of_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 2000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
