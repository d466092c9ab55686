"""What decides the bits of a computation, beside the program."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import slimgrad

_KERNELS = ("MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_", "ATEN_", "NVIDIA_TF32_", "CUBLAS_")
_SAYS_NOTHING = ("VERBOSE", "NUM_THREADS", "LOG")  # of bits; threads are there by their number


def describe_environment() -> dict[str, Any]:
    """Threads, processor, versions, and what the libraries of kernels were told. Where these differ, last bits may."""
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "slimgrad": slimgrad.__version__,
        "kernels": _kernels(),
    }


def _kernels() -> str:
    """What MKL, oneDNN and their like were told by environment variables, and torch by its own settings."""
    told = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_KERNELS) and not any(word in name for word in _SAYS_NOTHING)
    ]
    if not torch.backends.mkldnn.enabled:
        told.append("oneDNN off")
    if torch.get_float32_matmul_precision() != "highest":
        told.append(f"float32 products {torch.get_float32_matmul_precision()}")
    if torch.are_deterministic_algorithms_enabled():
        told.append("deterministic algorithms")
    return ", ".join(told) or "as they are"
