"""Packages that are compared with, each in an environment of its own, on this interpreter's torch.

None is a dependency. An environment is a venv with the package and what it imports alone (`pip install --no-deps`);
everything else, torch and slimgrad too, is found where this process finds it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from slimgrad.errors import RunError

PACKAGES = {
    "performer-pytorch": (
        "performer-pytorch==1.1.4", "einops==0.8.2", "local-attention==1.11.2", "axial-positional-embedding==0.3.12",
        "hyper-connections==0.4.11",
    ),
    "mambapy": ("mambapy==1.2.0",),
}  # fmt: skip


@cache
def interpreter(peer: str, folder: Path) -> str:
    """The Python that has the package, made when it is first asked for.

    Raises:
        RunError: the package could not be installed.
    """
    place = folder / peer
    python, packages = place / "bin" / "python", PACKAGES[peer]
    done = place / "installed.txt"
    if done.exists() and done.read_text().split() == list(packages):
        return str(python)
    venv = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", "--clear", str(place)]
    _run(venv, f"no environment could be made for {peer}")
    # a venv that is made in a venv sees the interpreter below, and not what is installed here
    (inside,) = place.glob("lib/python*/site-packages")
    (inside / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", *packages]
    _run(install, f"`pip install --no-deps {packages[0]}` failed; is there a network?")
    done.write_text("\n".join(packages))
    return str(python)


def _run(command: list[str], reason: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)  # which names this machine's paths and index: for the terminal alone
        raise RunError(reason)
