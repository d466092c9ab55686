"""The corpus "pydocs": the documentation topics that every Python installation carries, about half a megabyte.

`pydoc_data.topics` is what `help("topic")` prints. Topics are sorted by their key and joined, so one Python version
gives one sequence of bytes; another version gives other text. Some topics quote others (`while` is part of `compound`),
so a model has seen some of the validation text: 25% of the 32-byte strings in the last 32,768 bytes of Python 3.11's
occur earlier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimgrad.errors import InputError


def pydocs() -> Tensor:
    """The topics as uint8 `[bytes]`. Raises `InputError` where the Python installation lacks them."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "corpus pydocs: expected the module pydoc_data.topics of the standard library, which this Python "
            "installation was stripped of. Train on a file instead: slimgrad train FILE"
        ) from error
    text = "".join(topics[key] for key in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
