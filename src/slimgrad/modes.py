"""Modules in another mode for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(modules: Iterable[nn.Module], *, training: bool) -> Generator[None]:
    """Within the block these modules are in training mode, or in eval mode; afterwards each is in its own again.

    Only their flags are set: what a module does besides in a `train` of its own (merge its adapters, repack its
    weights) is not for a look at it.
    """
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
