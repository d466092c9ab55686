"""`slimgrad verify`: the exactness report of an untrained preset on random tokens."""

from __future__ import annotations

import torch

from slimgrad.bytelm.presets import get_preset
from slimgrad.errors import InputError
from slimgrad.models import Performer
from slimgrad.verification.model import verify

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def run_verification(preset: str, *, length: int, chunk: int, dtype: str) -> bool:
    """Print the report; return whether every gradient is exact."""
    config = get_preset(preset).model
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    for name, value, least in (("--length", length, 2), ("--chunk", chunk, 1)):
        if value < least:
            raise InputError(f"{name} {value}: expected at least {least}")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocabulary, (1, length), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Performer(config)
    report = verify(model, tokens, chunk=chunk, dtype=DTYPES[dtype])
    print(f"preset {preset}: {report}")
    return report.passed
