"""Models whose state is not in transformers' own cache, or whose code forgets the state it is handed: one by one.

Each mend is certified like everything else; none changes transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from slimgrad.hf.certificate import Certificate
from slimgrad.hf.step import BaseStep

STEPS: dict[str, type[BaseStep]] = {}


def step_for(inner: nn.Module, known: Certificate, *, chunk: int) -> BaseStep:
    """The base of `inner` as a causal step, mended where its type needs it, and run as the certificate says."""
    config: Any = inner.config
    kind = STEPS.get(config.model_type, BaseStep)
    return kind(
        inner.get_submodule(known.base),
        config,
        chunk=chunk,
        counts_from_chunk=known.counts_from_chunk,
        attention=known.chunk_attention,
    )


def base_of(inner: nn.Module) -> str | None:
    """The path of the base, for types whose cache is not transformers'; None elsewhere."""
    return None
