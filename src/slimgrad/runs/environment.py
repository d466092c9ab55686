"""What decides the bits of a computation, beside the program."""

from __future__ import annotations

import platform
from typing import Any

import torch

import slimgrad


def describe_environment() -> dict[str, Any]:
    """Threads, processor and versions. Where these differ, last bits may."""
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "slimgrad": slimgrad.__version__,
    }
