"""Random draws that come out the same in both sweeps: each chunk draws from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

from slimgrad.errors import InputError
from slimgrad.sweep.turn import turn

P = ParamSpec("P")
T = TypeVar("T")
_MASK = (1 << 64) - 1


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which waits for the end of a chunk of another thread's sweep, when a model is its own again."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with turn.taken():
            return function(*args, **kwargs)

    return call


def draw_seed() -> int:
    """One 64-bit draw from torch's global generator: so a seeded program stays reproducible."""
    with turn.taken():
        drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (), device="cpu", generator=torch.default_generator)
        return int(drawn.item()) & _MASK


def derive_seed(seed: int, position: int) -> int:
    """The seed of what begins at `position` (splitmix64: Steele, Lea & Flood, OOPSLA 2014).

    Keyed by position in the sequence, not by a chunk's number, so that it does not depend on how what came before was
    cut. No two positions of one `seed` share a derived one; torch's CPU generator reads the lower 32 of its 64 bits.

    Args:
        seed: of the whole sweep, 64 bits.
        position: tokens before the chunk; -1 stands for the initial state.
    """
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def generators(*devices: torch.device) -> list[torch.Generator]:
    """The generators that a model on `devices` draws from unless told otherwise: the CPU's, and each device's own.

    Args:
        devices: where the model is. Without an index: its backend's current device.

    Raises:
        InputError: a device's backend does not say where its generators are.
    """
    return [torch.default_generator, *(_generator_of(device) for device in devices if device.type != "cpu")]


def _generator_of(device: torch.device) -> torch.Generator:
    backend: Any = getattr(torch, device.type, None)
    if device.type == "mps":  # one device, one generator
        return backend._get_default_mps_generator()
    if not hasattr(backend, "default_generators"):
        raise InputError(
            f"random draws on {device}: expected torch.{device.type}.default_generators, a generator for each device, "
            "as torch.cuda has; there is none. Move the model to a device of another kind"
        )
    if hasattr(backend, "init"):
        backend.init()  # before that the list is empty
    index = cast(int | None, device.index)  # torch's annotation leaves the None out
    return backend.default_generators[backend.current_device() if index is None else index]


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Generator[None]:
    """Within the block the generators of CPU and devices draw from `seed`; then they are where they were.

    Other devices' generators are not touched. One thread at a time: others wait.
    """
    with turn.taken():
        saved = [(generator, generator.get_state()) for generator in generators(*devices)]
        try:
            for generator, _ in saved:
                generator.manual_seed(seed)
            yield
        finally:
            for generator, state in saved:
                generator.set_state(state)
