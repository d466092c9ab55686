"""The folder that holds what was fetched or made once: `SLIMGRAD_DATA`, or else the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from slimgrad.errors import InputError
from slimgrad.runs.files import NO_LOCKS, sha256

CACHE_VARIABLE = "SLIMGRAD_DATA"


def cache_folder() -> Path:
    """Where it is; it need not be there yet."""
    import pooch

    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("slimgrad")).expanduser()


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Be the only process that writes this file into the cache. Errors of what it is made from are for the caller.

    Raises:
        InputError: it cannot be written there.
    """
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
            except OSError as error:
                if error.errno not in NO_LOCKS:  # else two processes may both write it: to the same bytes
                    raise
            yield
    except OSError as error:
        raise InputError(
            f"{path}: expected a cache to write to, got: {error.strerror or error}. Free some space, or name another "
            f"folder in the environment variable {CACHE_VARIABLE}"
        ) from error


def sha256_of(path: Path) -> str:
    """Of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return sha256(path)
    except OSError as error:
        raise not_readable(path, error) from error


def not_readable(path: Path, error: OSError) -> InputError:
    """For a file that the system does not give."""
    return InputError(f"{path}: expected a readable file, got: {error.strerror or error}. Check its rights")
