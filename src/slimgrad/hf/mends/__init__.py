"""Models whose state is not in transformers' own cache, or whose code forgets the state it is handed: one by one.

Each mend is small, says what its model does and why the mend is exact, and is certified like everything else. None
changes transformers or another model: what a mend puts on a model's modules, `disable` takes away.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from torch import nn

from slimgrad.hf.certificate import Certificate
from slimgrad.hf.mends.forward import MendedForward
from slimgrad.hf.step import BaseStep

__all__ = ["MendedForward", "base_of", "step_for"]

# by model type: where its step is, imported when such a model is there
_STEPS = {
    "mamba": "scan.ScanStep",
    "falcon_mamba": "scan.ScanStep",
    "jamba": "scan.ScanStep",
    "zamba": "scan.ScanStep",
    "minimax": "minimax.MiniMaxStep",
    "rwkv": "rwkv.RwkvStep",
    "xlstm": "xlstm.XlstmStep",
    "gpt_neox_japanese": "contiguous.ContiguousStep",
    "deepseek_v4": "deepseek.DeepseekStep",
    "mllama_text_model": "mllama.MllamaStep",
    "hrm_text": "without_gradients.CyclesStep",
}
_OWN_CACHES = ("minimax", "rwkv", "xlstm")


def step_for(inner: nn.Module, known: Certificate, *, chunk: int) -> BaseStep:
    """The base of `inner` as a causal step, mended where its type needs it, and run as the certificate says."""
    base, config = inner.get_submodule(known.base), cast(Any, inner).config
    kind = _kind_for(getattr(base, "config", config).model_type)
    return kind(base, config, chunk=chunk, counts_from_chunk=known.counts_from_chunk, attention=known.chunk_attention)


def _kind_for(model_type: str) -> type[BaseStep]:
    where = _STEPS.get(model_type)
    if where is None:
        return BaseStep
    file, name = where.split(".")
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)


def base_of(inner: nn.Module) -> str | None:
    """The path of the base, for types whose cache is not transformers'; None elsewhere."""
    if cast(Any, inner).config.model_type not in _OWN_CACHES:
        return None
    prefix = cast(str, cast(Any, inner).base_model_prefix)
    return prefix if hasattr(inner, prefix) else ""
