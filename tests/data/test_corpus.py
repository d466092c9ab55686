"""Corpora: bytes as they are, read where they lie; one clear error for each thing a file or folder can lack."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from slimgrad import InputError
from slimgrad.data import KNOWN, Corpus, Documents, load_corpus, map_file, pydocs
from slimgrad.data.fetching import REGISTRY, RemoteFile

REAL = Path(__file__).parents[2].parent / "shared" / "data"  # copies of the official files, where there are any


def contents(text: Documents) -> list[bytes]:
    return [bytes(text.read(*span).tolist()) for span in text.spans]


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"no copy of {name} at {REAL}")
    return REAL / name


def test_mapped_file_holds_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "all.bin"
    path.write_bytes(bytes(range(256)) * 3)
    data = map_file(path)
    assert data.dtype == torch.uint8
    assert bytes(data.tolist()) == path.read_bytes()


def test_a_read_only_file_maps(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc")
    path.chmod(0o444)
    assert bytes(map_file(str(path)).tolist()) == b"abc"


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abcdef")
    text = load_corpus(path).text
    path.write_bytes(b"abcd")
    assert bytes(text.read(1, 4).tolist()) == b"bcd"
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: expected bytes up to 6, .* ends at 4 now"):
        text.read(1, 6)
    path.unlink()
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: expected a readable file, got: No such file"):
        text.read(0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="where /proc tells of pages")
def test_what_is_read_of_files_is_not_resident(tmp_path: Path) -> None:
    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    for name in "ab":
        with (tmp_path / name).open("wb") as file:
            file.truncate(24 << 20)
    text = load_corpus(tmp_path).text
    before = mapped()
    assert sum(int(piece.sum()) for piece in text.pieces(0, len(text))) == 0
    assert mapped() - before < 4096  # KiB, of 48 MiB


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
    assert load_corpus().name == load_corpus("pydocs").name == "pydocs"


def test_a_file_is_one_document_named_after_it(tmp_path: Path) -> None:
    path = tmp_path / "my book.txt"
    path.write_bytes(b"abc")
    for source in (path, str(path)):
        corpus = load_corpus(source)
        assert (corpus.name, corpus.source, contents(corpus.text)) == ("my book", str(path), [b"abc"])
        assert corpus.validation is None


def test_a_known_name_wins_over_a_file_unless_it_is_written_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in KNOWN:
        Path(name).write_bytes(b"mine")
        assert contents(load_corpus(f".{os.sep}{name}").text) == [b"mine"]
        assert contents(load_corpus(Path(name)).text) == [b"mine"]
    assert len(load_corpus("pydocs").text) > 4
    with pytest.raises(InputError, match=r"nowhere: expected ptb\.train\.txt"):
        load_corpus("ptb", data_dir=Path("nowhere"))


def test_a_folder_is_its_files_in_byte_order_without_hidden_and_empty_ones(tmp_path: Path) -> None:
    folder = tmp_path / "v1.2"
    wanted = ["B", "a b/z", "a.txt", "a/b/c", "a0", "é", "\N{FULLWIDTH DIGIT ONE}", "\N{GRINNING FACE}"]
    assert wanted == sorted(wanted, key=os.fsencode)
    for name in [*wanted[::-1], ".hidden", ".git/config", "a/.x/y"]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))
    (folder / "a/empty").touch()
    corpus = load_corpus(folder)
    assert contents(corpus.text) == [os.fsencode(name) for name in wanted]
    assert (corpus.name, corpus.source) == ("v1.2", f"8 files below {folder}")


def test_the_folder_itself_may_be_hidden_or_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".books"
    folder.mkdir()
    (folder / "a").write_bytes(b"abc")
    assert load_corpus(folder).name == ".books"
    monkeypatch.chdir(folder)
    for source in (".", f"..{os.sep}.books", f".{os.sep}"):
        assert (load_corpus(source).name, contents(load_corpus(source).text)) == (".books", [b"abc"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name is text, and links and pipes may be refused")
def test_links_are_followed_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/text").write_bytes(b"outside")
    (folder / "below/text").write_bytes(b"below")
    (folder / "file link").symlink_to(tmp_path / "outside/text")
    (folder / "folder link").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    (folder / "below/up").symlink_to("..")
    (tmp_path / "outside/in again").symlink_to(folder)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "itself").symlink_to("itself")
    os.mkfifo(folder / "pipe")
    assert contents(load_corpus(folder).text) == [b"below", b"outside", b"outside"]
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert load_corpus(link).name == "link"
    assert len(load_corpus(link).text.documents) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name is text")
def test_a_name_that_is_no_text_is_read_like_any_other(tmp_path: Path) -> None:
    for name in (b"b", b"a\xff"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(name)
    assert contents(load_corpus(tmp_path).text) == [b"a\xff", b"b"]


def test_a_folder_may_hold_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    for i in range(300):
        (tmp_path / f"{i:03d}").write_bytes(b"%03d" % i)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        text = load_corpus(tmp_path).text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert contents(text) == [b"%03d" % i for i in range(300)]


def test_a_folder_with_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_bytes(b"abc")
    with pytest.raises(
        InputError, match=f"{re.escape(str(tmp_path))}: expected a folder with files to read, found none"
    ):
        load_corpus(tmp_path)


@pytest.mark.parametrize("source", ["absent", "", "copying", "enwik9", "./ptb"])
def test_nothing_of_that_name_says_what_there_is(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"not read where the name is empty")
    message = (
        "expected a file or folder, or one of pydocs, enwik8, ptb, tinyshakespeare, copying; found nothing of that name"
    )
    with pytest.raises(InputError, match=message):
        load_corpus(source)


def test_what_the_system_refuses_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"xxx: expected a readable file or folder, got: .*name too long") as caught:
        load_corpus("x" * 5000)
    assert "\n" not in str(caught.value)

    (tmp_path / "below").mkdir()
    (tmp_path / "below/text").write_bytes(b"abc")

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # not through rights: some may read everything
    message = "{}: expected a readable file or folder, got: Permission denied. Check its rights"
    with pytest.raises(InputError, match=message.format(re.escape(str(tmp_path / "below/text")))):
        load_corpus(tmp_path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=message.format(re.escape(str(tmp_path)))):
        load_corpus(tmp_path)


def test_split_shares_no_byte_and_loses_none() -> None:
    data = torch.arange(103, dtype=torch.uint8)
    corpus = Corpus(name="text", source="here", text=Documents([data[:95], data[95:]]))
    train, validation = corpus.split(validation_bytes=10, window=93, held_out="end")
    assert (len(train), len(validation)) == (93, 10)
    assert torch.equal(torch.cat([train.read(0, 93), validation.read(0, 10)]), data)
    for held_out in ("spread", "end"):
        train, validation = corpus.split(validation_bytes=10, window=93, held_out=held_out)
        assert (len(train), len(validation)) == (93, 10)
        both = torch.cat([train.read(0, 93), validation.read(0, 10)])
        assert torch.equal(both.sort().values, data)
    with pytest.raises(InputError, match=r"text: expected at least 104 bytes .*94 and 10 for validation\), got 103"):
        corpus.split(validation_bytes=10, window=94)
    with pytest.raises(InputError, match="validation_bytes=1: expected at least 2 bytes"):
        corpus.split(validation_bytes=1, window=4)


def test_what_is_held_out_comes_from_all_over_the_text() -> None:
    data = (torch.arange(100_000) // 1000).to(torch.uint8)  # each byte says in which hundredth it is
    corpus = Corpus(name="text", source="here", text=Documents([data[:30_000], data[30_000:]]))
    train, validation = corpus.split(validation_bytes=10_000, window=2)
    assert (len(train), len(validation)) == (90_000, 10_000)
    found = validation.read(0, 10_000)
    assert [int((found // 12.5 == eighth).sum()) for eighth in range(8)] == [1250] * 8
    assert found.max() < 95  # not the end, which in many texts is not like the rest
    assert len(train.documents) == 10
    for few, places in ((9000, 8), (5000, 4), (2047, 1), (100, 1)):
        _, validation = corpus.split(validation_bytes=few, window=2)
        assert (len(validation), len(validation.documents)) == (few, places)


def test_a_share_is_the_end_of_each_document() -> None:
    pieces = [torch.full((size,), size, dtype=torch.uint8) for size in (100, 3, 50)]
    corpus = Corpus(name="text", source="here", text=Documents(pieces))
    train, validation = corpus.split(validation_bytes=2, window=2, held_out="0.1")
    assert [len(document) for document in validation.documents] == [10, 5]
    assert [len(document) for document in train.documents] == [90, 3, 45]
    assert corpus.bytes_of_share(0.1) == 15
    with pytest.raises(InputError, match=r"expected a share of its documents that is at least 2 bytes, 0\.01 is 1"):
        corpus.split(validation_bytes=2, window=2, held_out="0.01")


def test_split_takes_the_official_validation_from_its_start() -> None:
    data = torch.arange(103, dtype=torch.uint8)
    text, official = Documents([data[:50]]), Documents([data[50:60], data[60:]])
    corpus = Corpus(name="text", source="here", text=text, validation=official)
    for few, found in ((12, 12), (53, 53), (1000, 53)):
        train, validation = corpus.split(validation_bytes=few, window=50)
        assert train is text
        assert torch.equal(validation.read(0, len(validation)), data[50 : 50 + found])


def test_enwik8_is_split_at_90_and_95_million(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "enwik8"
    with path.open("wb") as file:  # mostly a hole
        for place, letter in (
            (0, b"a"),
            (89_999_999, b"b"),
            (90_000_000, b"c"),
            (94_999_999, b"d"),
            (99_999_999, b"e"),
        ):
            file.seek(place)
            file.write(letter)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    monkeypatch.setitem(REGISTRY, "enwik8", (RemoteFile(name="enwik8", address="unused", sha256=sha256),))
    corpus = load_corpus("enwik8", data_dir=tmp_path)
    assert corpus.validation is not None
    assert (corpus.name, len(corpus.text), len(corpus.validation)) == ("enwik8", 90_000_000, 5_000_000)
    ends = [
        (text.read(0, 1).item(), text.read(len(text) - 1, len(text)).item())
        for text in corpus.split(validation_bytes=5_000_000, window=1000)
    ]
    assert ends == [(ord("a"), ord("b")), (ord("c"), ord("d"))]


def test_tinyshakespeare_has_no_official_split(tmp_path: Path) -> None:
    original = real("tinyshakespeare.txt")
    (tmp_path / "input.txt").symlink_to(original)
    for folder in (original.parent, tmp_path):
        corpus = load_corpus("tinyshakespeare", data_dir=folder)
        assert (corpus.name, len(corpus.text), corpus.validation) == ("tinyshakespeare", 1_115_394, None)


def test_ptb_keeps_its_official_split(tmp_path: Path) -> None:
    with tarfile.open(real("ptb.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    for folder in (tmp_path, tmp_path / "ptb"):
        corpus = load_corpus("ptb", data_dir=folder)
        assert corpus.validation is not None
        assert (corpus.name, len(corpus.text), len(corpus.validation)) == ("ptb", 5_101_618, 399_782)
    (tmp_path / "ptb/ptb.valid.txt").unlink()
    with pytest.raises(InputError, match=r"expected ptb\.valid\.txt or ptb/ptb\.valid\.txt in this folder, found none"):
        load_corpus("ptb", data_dir=tmp_path)
