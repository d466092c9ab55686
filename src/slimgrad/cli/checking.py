"""`slimgrad verify`: a preset's or a run's shape on random tokens, or a Hugging Face model's certificate."""

from __future__ import annotations

from pathlib import Path

import torch

from slimgrad.bytelm import open_model
from slimgrad.bytelm.presets import PRESETS, get_preset
from slimgrad.cli.finetuning import is_hugging_face
from slimgrad.errors import InputError
from slimgrad.models import Performer, PerformerConfig
from slimgrad.verification.model import chosen_chunk, verify

LENGTH, CHUNK = 200, 48
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def run_verification(model: str, *, length: int | None, chunk: int | None, dtype: str | None) -> bool:
    """Print the report of a preset, or the certificate of a Hugging Face model; return whether it is exact."""
    if model not in PRESETS and (Path(model).exists() or "/" in model):
        if not is_hugging_face(model):
            performer, _ = open_model(Path(model))
            return _compare(f"{model}, its shape", performer.config, length, chunk, dtype)
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
    return _compare(f"preset {model}", get_preset(model).model, length, chunk, dtype)


def _compare(name: str, config: PerformerConfig, length: int | None, chunk: int | None, dtype: str | None) -> bool:
    """An untrained model of that shape on random tokens: weights are not what decides whether gradients are exact."""
    length = LENGTH if length is None else length
    chunk = chosen_chunk(length, CHUNK) if chunk is None else chunk
    dtype = dtype or "float64"
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    for option, value, least in (("--length", length, 2), ("--chunk", chunk, 1)):
        if value < least:
            raise InputError(f"{option} {value}: expected at least {least}")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocabulary, (1, length), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Performer(config)
    report = verify(model, tokens, chunk=chunk, dtype=DTYPES[dtype])
    print(f"{name}: {report}")
    return report.passed
