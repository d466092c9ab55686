"""Random draws that come out the same in both sweeps: each chunk draws from a seed of its own."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

_MASK = (1 << 64) - 1
_turn = threading.RLock()  # a process has one generator for its CPU: sweeps in other threads wait for a chunk's end


def draw_seed() -> int:
    """One 64-bit draw from torch's global generator: so a seeded program stays reproducible."""
    with _turn:
        return int(torch.randint(-(1 << 63), (1 << 63) - 1, ()).item()) & _MASK


def derive_seed(seed: int, index: int) -> int:
    """An independent seed for every index (splitmix64: Steele, Lea & Flood, OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Within the block the generators of CPU and device draw from `seed`; then they are where they were.

    One thread at a time: others wait.
    """
    backend = None if device.type == "cpu" else torch.get_device_module(device)
    with _turn:
        cpu_state = torch.get_rng_state()
        device_state = None if backend is None else backend.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            if backend is not None:
                backend.manual_seed(seed)
            yield
        finally:
            torch.set_rng_state(cpu_state)
            if backend is not None:
                backend.set_rng_state(device_state)
