"""Where a model computes."""

from __future__ import annotations

from typing import get_args

import torch

from slimgrad.bytelm.config import Device
from slimgrad.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one that torch can use, else the CPU.

    Raises:
        InputError: no such name, or no such device here.
    """
    if name not in get_args(Device):
        raise InputError(f"device {name!r}: expected one of {', '.join(get_args(Device))}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device 'cuda': expected a GPU that torch can use, found none. Use cpu, or a CUDA build of torch"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
