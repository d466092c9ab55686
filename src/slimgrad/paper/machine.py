"""What a figure was measured on, and what memory is left there."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from slimgrad.runs.environment import describe_environment


def describe_machine() -> dict[str, Any]:
    """Processor, GPU, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    versions = {"python": platform.python_version(), "system": platform.system()}
    return {"cpu": cpu, **gpu, **describe_environment(), **versions}


def available_bytes(device: str = "cpu") -> int:
    """Memory that could still be had."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
