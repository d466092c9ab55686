"""What `pip install slimgrad` leaves out, and one sentence where it is missing.

The library itself needs torch, numpy, jaxtyping and safetensors. Everything else is an extra of pyproject.toml.
"""

from __future__ import annotations

import importlib.util

from slimgrad.errors import MissingExtraError

EXTRAS = {
    "train": (
        "typer", "rich", "uniplot", "matplotlib", "pydantic", "pooch", "requests", "tqdm", "filelock", "psutil",
        "pyyaml", "zstandard",
    ),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "hf": ("transformers", "accelerate", "peft", "datasets"),
}  # fmt: skip
_MODULES = {"pyyaml": "yaml"}


def module_of(package: str) -> str:
    """The name by which it is imported."""
    return _MODULES.get(package, package)


def require_extra(extra: str, what: str, *packages: str) -> None:
    """Refuse what an extra serves where it is not installed.

    Args:
        extra: its name in pyproject.toml.
        what: that needs it, as the message begins.
        packages: of those of the extra; none: all.

    Raises:
        MissingExtraError: says what is missing, and the command that installs it.
    """
    wanted = packages or EXTRAS[extra]
    missing = [package for package in wanted if importlib.util.find_spec(module_of(package)) is None]
    if missing:
        several = f"the packages {', '.join(missing)}, which are" if len(missing) > 1 else f"{missing[0]}, which is"
        raise MissingExtraError(f"{what}: expected {several} not installed. Run: pip install 'slimgrad[{extra}]'")
