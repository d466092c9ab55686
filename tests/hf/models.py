"""Tiny models of each kind in float64, their gradients with and without `enable`, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import slimgrad.hf  # noqa: E402
from slimgrad.hf.forwards import enabled  # noqa: E402
from slimgrad.hf.widen import widened  # noqa: E402

VOCABULARY, WIDTH = 97, 32
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**fields: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **fields}))


def window() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=9))


def mamba2() -> Any:
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8, "expand": 2}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shape, **sizes))


def hybrid(**fields: Any) -> Any:
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes |= {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = ["linear_attention", "full_attention"]
    shape = {**SHAPE, **sizes, **fields}
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**shape, layer_types=kinds))


def gemma2() -> Any:
    sizes = {"head_dim": 8, "sliding_window": 9, "final_logit_softcapping": 3.0}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE, **sizes))


def mixtral(**fields: Any) -> Any:
    experts = {"num_local_experts": 4, "experts_implementation": "eager"}  # others have no float64
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, **experts, **fields))


def bart() -> Any:
    """Its loss is a cross-entropy of its own, of the label in place."""
    sizes = {"d_model": WIDTH, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.BartConfig(vocab_size=VOCABULARY, max_position_embeddings=256, dropout=0.0, **sizes)
    return transformers.BartForCausalLM(config)


KINDS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "window": window,
    "mamba2": mamba2,
    "hybrid": hybrid,
    "gemma2": gemma2,
    "mixtral": mixtral,
    "bart": bart,
}


def large(model: Any) -> Any:
    """In float64 and training, with weights so large that what a token sees of others matters."""
    generator = torch.Generator().manual_seed(5)
    model = model.double().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.copy_(torch.empty_like(p).normal_(0, 0.15, generator=generator))
    return model


def without_dropout(model: Any) -> Any:
    """What plain and swept draws could not be compared with."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model


def tokens(rows: int = 2, time: int = 44, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


def enable(model: Any, chunk: int | None = 13, **options: Any) -> Any:
    """As users do, and its chunks without casts to float32, so that float64 can be compared."""
    slimgrad.hf.enable(model, chunk=chunk, **options)
    for forward in enabled(model):
        if hasattr(forward, "step"):
            forward.step.around = widened
    return model


def sweeps(model: nn.Module) -> int:
    """How many sequences have been swept: a test of equality means nothing if none was."""
    return sum(getattr(forward, "sweeps", 0) for forward in enabled(model))


def taken(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, which are then none."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradients(model: nn.Module, **given: Any) -> tuple[float, dict[str, Tensor]]:
    """The model's own loss, and its gradients."""
    with widened():
        loss = model(**given).loss
        loss.backward()
    return loss.item(), taken(model)


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient (key biases, whose gradient is zero, against 1e-6 of all together)."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    every = torch.stack([g.double().norm() for g in expected.values()]).norm()
    return max(
        ((got[name].double() - g.double()).norm() / g.double().norm().clamp(min=1e-6 * every)).item()
        for name, g in expected.items()
    )
