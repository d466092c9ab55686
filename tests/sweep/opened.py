"""The files without a name that this process holds open."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def open_files(folder: Path) -> list[int]:
    """Descriptors of those that lie in `folder`: Linux alone tells."""
    found: list[int] = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith(f"{folder}/"):
                found.append(int(entry.name))
        except FileNotFoundError:  # that of this listing
            continue
    return found


def wait_for_threads() -> None:
    """Until no thread of a store that nobody holds any more is at work."""
    for thread in threading.enumerate():
        if thread.name.startswith("slimgrad-store"):
            thread.join()
