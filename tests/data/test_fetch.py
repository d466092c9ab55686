"""Fetching, from a local server: what is handed out is verified; what goes wrong says so, and leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import re
import socket
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from slimgrad import InputError
from slimgrad.data import KNOWN, fetch, fetching, load_corpus
from slimgrad.data.fetching import REGISTRY, RemoteFile

BODY = b"".join(b"%07d " % i for i in range(40_000))  # several pieces of the download
HAND = r"\. Try again, or put the file into a folder as {} by hand and name the folder with --data-dir$"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


class Answer(NamedTuple):
    body: bytes = BODY
    status: int = 200
    missing: int = 0  # bytes that are announced and not sent


class Server(ThreadingHTTPServer):
    """Serves `answers` in turn, the last one for ever, and counts the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = [Answer()]
        self.requests = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/text"

    def next_answer(self) -> Answer:
        self.requests += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        answer = self.server.next_answer()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.body) + answer.missing))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMGRAD_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(server: Server, monkeypatch: pytest.MonkeyPatch) -> RemoteFile:
    """A corpus of one file, "text"."""
    file = RemoteFile(name="text", address=server.address, sha256=sha256(BODY), other_names=("below/other",))
    monkeypatch.setitem(REGISTRY, "text", (file,))
    return file


@pytest.fixture
def archive(server: Server, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A corpus like enwik8: what the server sends is a zip file."""
    content = zipped("enwik8", BODY)
    server.answers = [Answer(content)]
    register_zip(server, monkeypatch, content)
    return content


def register_zip(server: Server, monkeypatch: pytest.MonkeyPatch, content: bytes, body: bytes = BODY) -> None:
    file = RemoteFile(name="enwik8", address=server.address, sha256=sha256(body), zip_sha256=sha256(content))
    monkeypatch.setitem(REGISTRY, "enwik8", (file,))


def kept(cache: Path) -> dict[str, bytes]:
    """What is in the cache, but for locks."""
    return {path.name: path.read_bytes() for path in cache.iterdir() if not path.name.endswith(".lock")}


def test_every_corpus_but_pydocs_is_in_the_table() -> None:
    assert ("pydocs", *REGISTRY) == KNOWN
    files = [file for corpus in REGISTRY.values() for file in corpus]
    assert all(file.address.startswith("https://") for file in files)
    sums = [s for file in files for s in (file.sha256, file.zip_sha256) if s]
    assert all(re.fullmatch("[0-9a-f]{64}", s) for s in sums)
    assert len(set(sums)) == len(sums) == 5
    with pytest.raises(InputError, match="one of enwik8, ptb, tinyshakespeare, got 'enwik9'"):
        fetch("enwik9")


@pytest.mark.usefixtures("text")
def test_a_file_is_fetched_once(server: Server, cache: Path) -> None:
    assert fetch("text") == [cache / "text"]
    assert kept(cache) == {"text": BODY}
    assert fetch("text") == [cache / "text"]
    assert server.requests == 1


@pytest.mark.usefixtures("text")
def test_without_a_variable_it_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "os" / name)
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("SLIMGRAD_DATA", raising=False)
        else:
            monkeypatch.setenv("SLIMGRAD_DATA", value)
        assert fetch("text") == [tmp_path / "os/slimgrad/text"]


@pytest.mark.usefixtures("text")
def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server, cache: Path) -> None:
    fetch("text")
    (cache / "text").write_bytes(BODY[:-1] + b"x")
    assert fetch("text")[0].read_bytes() == BODY
    assert server.requests == 2


@pytest.mark.parametrize(
    ("answer", "happened"),
    [
        (Answer(BODY[:-9], missing=9), r"IncompleteRead\(319991 bytes read, 9 more expected\)"),
        (Answer(b"", missing=9), r"IncompleteRead\(0 bytes read, 9 more expected\)"),
        (Answer(BODY[:-1] + b"x"), f"SHA256 .* expected sha256:{sha256(BODY)} but got {sha256(BODY[:-1] + b'x')}"),
        (Answer(b"not here", status=404), "HTTP 404 Not Found"),
        (Answer(b"later", status=503, missing=5), "HTTP 503 Service Unavailable"),
    ],
    ids=["truncated", "empty", "checksum", "404", "503"],
)
@pytest.mark.usefixtures("text")
def test_what_goes_wrong_is_said_and_leaves_nothing_and_the_next_attempt_succeeds(
    answer: Answer, happened: str, server: Server, cache: Path
) -> None:
    server.answers = [answer, answer, Answer()]
    message = f"^{server.address}: expected to fetch text, got: {happened}" + HAND.format("text")
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            fetch("text")
        assert kept(cache) == {}
    assert fetch("text")[0].read_bytes() == BODY


def test_a_refused_connection_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/text"
    monkeypatch.setitem(REGISTRY, "text", (RemoteFile(name="text", address=address, sha256=sha256(BODY)),))
    with pytest.raises(InputError, match=rf"^{address}: expected to fetch text, got: \[Errno \d+\] .*refused"):
        fetch("text")
    assert kept(cache) == {}


def test_a_name_that_does_not_resolve_is_said(cache: Path, text: RemoteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        InputError, match=rf"^{text.address}: .* got: \[Errno -2\] Name or service not known\. Try again"
    ):
        fetch("text")
    assert kept(cache) == {}


@pytest.mark.usefixtures("text")
def test_the_reason_is_not_an_error_that_was_there_before(server: Server, cache: Path) -> None:
    server.answers = [Answer(b"", missing=1)]
    try:
        raise KeyError("something else")
    except KeyError:
        with pytest.raises(InputError, match="got: IncompleteRead"):
            fetch("text")
    assert kept(cache) == {}


def test_a_zip_file_is_unpacked(archive: bytes, server: Server, cache: Path) -> None:
    assert fetch("enwik8") == [cache / "enwik8"]
    assert kept(cache) == {"enwik8": BODY, "enwik8.zip": archive}
    (cache / "enwik8").write_bytes(BODY[:-1])  # unpacked again, not fetched again
    assert fetch("enwik8")[0].read_bytes() == BODY
    (cache / "enwik8.zip").unlink()
    assert fetch("enwik8")[0].read_bytes() == BODY
    assert server.requests == 1


def test_a_zip_file_that_arrived_damaged_is_refused(archive: bytes, server: Server, cache: Path) -> None:
    server.answers = [Answer(archive[:-9], missing=9), Answer(archive[:99] + b"xx" + archive[101:]), Answer(archive)]
    for happened in ("IncompleteRead", "SHA256"):
        with pytest.raises(InputError, match=f"expected to fetch enwik8.zip, got: {happened}.*as enwik8.zip by hand"):
            fetch("enwik8")
        assert kept(cache) == {}
    assert fetch("enwik8")[0].read_bytes() == BODY


@pytest.mark.parametrize(
    ("content", "happened"),
    [
        (b"no zip file", r"expected a zip file with enwik8 in it, got: File is not a zip file"),
        (zipped("enwik9", BODY), r"expected a zip file with enwik8 in it, got: There is no item named 'enwik8'"),
        (zipped("enwik8", BODY[:-1]), f"expected in it enwik8 with sha256 {sha256(BODY)}, found {sha256(BODY[:-1])}"),
        (zipped("enwik8", BODY)[:60] + bytes(900) + zipped("enwik8", BODY)[960:], "expected a zip file .*got: .+"),
    ],
    ids=["none", "other name", "other content", "damaged within"],
)
def test_a_zip_file_that_cannot_be_unpacked_leaves_nothing(
    content: bytes, happened: str, server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum is the one in the table: what is damaged here is found by unpacking alone."""
    register_zip(server, monkeypatch, content)
    server.answers = [Answer(content)]
    with pytest.raises(InputError, match=rf"enwik8\.zip: {happened}.*Get it again") as caught:
        fetch("enwik8")
    assert "\n" not in str(caught.value)
    assert kept(cache) == {}
    (tmp_path / "enwik8.zip").write_bytes(content)
    with pytest.raises(InputError, match=rf"enwik8\.zip: {happened}"):
        fetch("enwik8", data_dir=tmp_path)
    assert kept(cache) == {}
    assert (tmp_path / "enwik8.zip").exists()  # what is the user's stays


def _fetch_in_child(file: RemoteFile, barrier: threading.Barrier) -> None:
    REGISTRY["enwik8"] = (file,)
    barrier.wait(60)
    path = fetch("enwik8")[0]
    assert sha256(path.read_bytes()) == file.sha256


@pytest.mark.usefixtures("archive")
def test_two_processes_at_once_fetch_once(server: Server, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    children = [context.Process(target=_fetch_in_child, args=(REGISTRY["enwik8"][0], barrier)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    for child in children:
        child.close()
    assert kept(cache).keys() == {"enwik8", "enwik8.zip"}
    assert server.requests == 1


@pytest.mark.usefixtures("archive")
def test_threads_at_once_fetch_once(server: Server, cache: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: sha256(fetch("enwik8")[0].read_bytes()), range(6)))
    assert found == [sha256(BODY)] * 6
    assert kept(cache).keys() == {"enwik8", "enwik8.zip"}
    assert server.requests == 1


@pytest.mark.usefixtures("archive")
def test_what_another_finished_meanwhile_is_not_done_again(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def waited_for_another(_: Path) -> Iterator[None]:
        (cache / "enwik8").write_bytes(BODY)
        yield

    monkeypatch.setattr("filelock.FileLock", waited_for_another)
    assert fetch("enwik8") == [cache / "enwik8"]
    assert server.requests == 0


@pytest.mark.usefixtures("text")
def test_a_full_cache_is_read_without_a_lock(cache: Path) -> None:
    fetch("text")
    (cache / ".text.lock").unlink(missing_ok=True)
    with FileLock(cache / ".text.lock"):  # held by another, or on a disk that is read-only
        assert fetch("text") == [cache / "text"]


@pytest.mark.usefixtures("text")
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIMGRAD_DATA", str(tmp_path / "file"))
    with pytest.raises(
        InputError, match=r"text: expected a cache to write to, got: .*environment variable SLIMGRAD_DATA"
    ):
        fetch("text")


@pytest.mark.usefixtures("text", "archive")
def test_the_users_folder_is_read_where_it_is(server: Server, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("below/other", "text", "enwik8"):
        (tmp_path / name).write_bytes(BODY)
        assert fetch(name if name == "enwik8" else "text", data_dir=tmp_path) == [tmp_path / name]
    assert server.requests == 0
    assert not cache.exists()


def test_the_users_zip_file_is_unpacked_into_the_cache(
    archive: bytes, server: Server, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "enwik8.zip").write_bytes(archive)
    for _ in range(2):
        assert fetch("enwik8", data_dir=folder) == [cache / "enwik8"]
        assert kept(cache) == {"enwik8": BODY}
    assert [path.name for path in folder.iterdir()] == ["enwik8.zip"]
    assert server.requests == 0


@pytest.mark.usefixtures("text", "archive")
def test_another_file_in_the_users_folder_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for corpus, name in (("text", "below/other"), ("text", "text"), ("enwik8", "enwik8.zip"), ("enwik8", "enwik8")):
        file = REGISTRY[corpus][0]
        expected = file.zip_sha256 if name == "enwik8.zip" else file.sha256
        (tmp_path / name).write_bytes(b"another")
        message = rf"^{re.escape(str(tmp_path / name))}: expected sha256 {expected}, found {sha256(b'another')}: "
        with pytest.raises(InputError, match=message):
            fetch(corpus, data_dir=tmp_path)
    assert server.requests == 0


def test_what_is_missing_from_the_users_folder_is_listed(tmp_path: Path) -> None:
    for corpus, names in {
        "enwik8": "enwik8 or enwik8.zip",
        "ptb": "ptb.train.txt or ptb/ptb.train.txt; and ptb.valid.txt or ptb/ptb.valid.txt",
        "tinyshakespeare": "tinyshakespeare.txt or input.txt",
    }.items():
        for folder in (tmp_path, tmp_path / "absent"):
            message = f"{folder}: expected {names} in this folder, found none of that name. Get it from https://"
            with pytest.raises(InputError, match=re.escape(message)):
                load_corpus(corpus, data_dir=folder)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("text", "cache")
def test_progress_is_shown_on_a_terminal_alone(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (_Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        server.answers = [Answer(BODY[:-1], missing=1), Answer()]
        with pytest.raises(InputError, match="IncompleteRead"):
            fetch("text")
        assert stream.getvalue().endswith("\n" if stream.isatty() else "")  # the error begins on a line of its own
        fetch("text")
        assert ("100%" in stream.getvalue()) is stream.isatty()
        os.unlink(cache / "text")


@pytest.mark.parametrize("fault", ["vanishes", "cannot be read"])
def test_an_archive_that_cannot_be_read_is_named_and_not_the_cache(
    fault: str, archive: bytes, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "enwik8.zip"
    own.write_bytes(archive)
    if fault == "vanishes":
        monkeypatch.setattr(fetching, "sha256_of", lambda path: (path.unlink(), sha256(archive))[1])
        words = "No such file or directory"
    else:
        words = "Input/output error"

        def failing(*_: object) -> bytes:
            raise OSError(errno.EIO, words)

        monkeypatch.setattr(zipfile.ZipExtFile, "read", failing)
    with pytest.raises(InputError, match=rf"^{own}: expected a readable file, got: {words}\. "):
        fetch("enwik8", data_dir=tmp_path)
    assert kept(cache) == {}


@pytest.mark.usefixtures("text")
def test_a_cache_that_cannot_be_looked_into_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    cache.write_text("a file")
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(InputError, match=rf"^{cache}/text: expected a cache to write to, got: "):
        fetch("text")
