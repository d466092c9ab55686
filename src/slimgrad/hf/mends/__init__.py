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

__all__ = ["MendedForward", "base_of", "mend_of", "step_for"]

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
# by file: what is mended, in words
_WORDS = {
    "scan": "its scan starts from the state before the chunk",
    "minimax": "its own cache class",
    "rwkv": "its list of states",
    "xlstm": "its own cache class",
    "contiguous": "keys and values laid out as it expects",
    "deepseek": "its own cache layers",
    "mllama": "layers that wait for images",
    "without_gradients": "cycles without gradients",
}
_OWN_CACHES = ("minimax", "rwkv", "xlstm")


def step_for(inner: nn.Module, known: Certificate, *, chunk: int) -> BaseStep:
    """The base of `inner` as a causal step, mended where its type needs it, and run as the certificate says."""
    base = inner.get_submodule(known.base)
    where = _STEPS.get(_model_type(inner, base))
    kind = BaseStep
    if where is not None:
        file, name = where.split(".")
        kind = cast("type[BaseStep]", getattr(importlib.import_module(f"{__name__}.{file}"), name))
    return kind(
        base,
        cast(Any, inner).config,
        chunk=chunk,
        counts_from_chunk=known.counts_from_chunk,
        attention=known.chunk_attention,
    )


def mend_of(inner: nn.Module, base: nn.Module) -> str:
    """What is mended, in words; empty: nothing."""
    return _WORDS.get(_STEPS.get(_model_type(inner, base), "").split(".")[0], "")


def _model_type(inner: nn.Module, base: nn.Module) -> str:
    return getattr(base, "config", cast(Any, inner).config).model_type


def base_of(inner: nn.Module) -> str | None:
    """The path of the base, for types whose cache is not transformers'; None elsewhere."""
    if cast(Any, inner).config.model_type not in _OWN_CACHES:
        return None
    prefix = cast(str, cast(Any, inner).base_model_prefix)
    return prefix if hasattr(inner, prefix) else ""
