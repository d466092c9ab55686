"""`slimgrad verify`: an untrained preset on random tokens, or the certificate of a Hugging Face model's class."""

from __future__ import annotations

from pathlib import Path

import torch

from slimgrad.bytelm.presets import PRESETS, get_preset
from slimgrad.cli.finetuning import is_hugging_face
from slimgrad.errors import InputError
from slimgrad.models import Performer
from slimgrad.verification.model import verify

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def run_verification(model: str, *, length: int | None, chunk: int | None, dtype: str | None) -> bool:
    """Print the report of a preset, or the certificate of a Hugging Face model; return whether it is exact."""
    if model not in PRESETS and (Path(model).exists() or "/" in model):
        if not is_hugging_face(model):
            raise InputError(f"{model} is a run of slimgrad: expected a Hugging Face model, or a preset by name")
        for name, value in (("--length", length), ("--chunk", chunk), ("--dtype", dtype)):
            if value is not None:
                raise InputError(f"{name} {value}: a Hugging Face model's certificate has its own; leave it out")
        from slimgrad.cli.tuning import run_certification

        return run_certification(model)
    if model not in PRESETS:
        raise InputError(
            f"unknown preset {model!r}: expected one of {', '.join(PRESETS)}; or the folder of a Hugging Face model, "
            "or its name with its owner's, as OWNER/NAME"
        )
    return _preset(model, length=200 if length is None else length, chunk=48 if chunk is None else chunk, dtype=dtype)


def _preset(preset: str, *, length: int, chunk: int, dtype: str | None) -> bool:
    dtype, config = dtype or "float64", get_preset(preset).model
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
