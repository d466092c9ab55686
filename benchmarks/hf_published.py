"""Configurations as in published models: class, and what their files say beside the class' defaults.

From the models' own `config.json`, sizes included; what is certified keeps all but the sizes.
"""

from __future__ import annotations

from typing import Any

import transformers

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768, "rope_theta": 1e6}
_DEEPSEEK_YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4}
_DEEPSEEK_YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
_OSS_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 150_000}
_OSS_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
_LONG |= {"short_factor": [1.0 + i / 40 for i in range(48)], "long_factor": [1.0 + 1.3 * i for i in range(48)]}
_LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
_GRANITE = ([*["linear_attention"] * 5, "full_attention", *["linear_attention"] * 4]) * 4

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        "Llama",
        {"hidden_size": 4096, "num_key_value_heads": 8, "rope_parameters": _LLAMA3, "vocab_size": 128_256},
    ),
    "Llama-3.2-1B": (
        "Llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rope_parameters": {**_LLAMA3, "factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "Llama-2-7B, dynamic RoPE": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": 4096,
        },
    ),
    "Llama-2-7B, linear RoPE": ("Llama", {"rope_parameters": _LINEAR, "max_position_embeddings": 32_768}),
    "Qwen2.5-7B": (
        "Qwen2",
        {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_hidden_layers": 28,
            "sliding_window": 131_072,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "Qwen2.5-7B, YaRN": (
        "Qwen2",
        {"num_attention_heads": 28, "hidden_size": 3584, "num_key_value_heads": 4, "rope_parameters": _YARN},
    ),
    "Qwen3-0.6B": (
        "Qwen3",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
    "Qwen3.5-4B": ("Qwen3_5", {"hidden_size": 2560, "tie_word_embeddings": True, "linear_num_key_heads": 16}),
    "Gemma-2-9B": (
        "Gemma2",
        {
            "hidden_size": 3584,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
    ),
    "Gemma-3-4B (text)": (
        "Gemma3",
        {"hidden_size": 2560, "num_hidden_layers": 34, "num_attention_heads": 8, "sliding_window": 1024},
    ),
    "Gemma-3n-E2B (text)": (
        "Gemma3n",
        {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": 8192},
    ),
    "Gemma-4-E2B (text)": (
        "Gemma4",
        {
            "num_hidden_layers": 35,
            "num_kv_shared_layers": 20,
            "num_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
        },
    ),
    "Mistral-7B-v0.1": ("Mistral", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "Mistral-7B-v0.3": ("Mistral", {"num_key_value_heads": 8, "sliding_window": None, "vocab_size": 32_768}),
    "Mixtral-8x7B": ("Mixtral", {"num_key_value_heads": 8, "sliding_window": None, "output_router_logits": False}),
    "Phi-3-mini-128k": (
        "Phi3",
        {
            "rope_parameters": _LONG,
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 131_072,
            "sliding_window": 262_144,
        },
    ),
    "gpt-oss-20b": ("GptOss", {"num_hidden_layers": 24, "num_local_experts": 32, "rope_parameters": _OSS_YARN}),
    "DeepSeek-V3": (
        "DeepseekV3",
        {"num_nextn_predict_layers": 1, "rope_parameters": _DEEPSEEK_YARN, "max_position_embeddings": 163_840},
    ),
    "mamba2-2.7b": (
        "Mamba2",
        {
            "hidden_size": 2560,
            "num_hidden_layers": 64,
            "num_heads": 80,
            "n_groups": 1,
            "state_size": 128,
            "tie_word_embeddings": True,
        },
    ),
    "mamba-130m": ("Mamba", {"hidden_size": 768, "num_hidden_layers": 24, "tie_word_embeddings": True}),
    "Falcon-H1-0.5B": (
        "FalconH1",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 36,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "mamba_d_ssm": 1536,
            "mamba_n_heads": 24,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "attention_in_multiplier": 1.0,
            "attention_out_multiplier": 0.9375,
            "key_multiplier": 0.39,
            "embedding_multiplier": 5.66,
            "lm_head_multiplier": 0.0195,
            "mlp_multipliers": [0.8839, 0.5859],
            "ssm_multipliers": [0.3536, 0.25, 0.3536, 0.5, 0.3536],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.2357,
        },
    ),
    "Zamba2-1.2B": (
        "Zamba2",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 38,
            "layers_block_type": [*(["linear_attention"] * 5 + ["hybrid"]) * 6, *["linear_attention"] * 2],
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
            "num_mem_blocks": 1,
        },
    ),
    "Jamba-v0.1": ("Jamba", {"attn_layer_period": 8, "attn_layer_offset": 4, "num_experts": 16}),
    "Granite-4.0-H-Tiny": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 40,
            "layer_types": _GRANITE,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "position_embedding_type": "nope",
            "tie_word_embeddings": True,
        },
    ),
    "LFM2-1.2B": ("Lfm2", {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16, "block_ff_dim": 12_288}),
    "Nemotron-H-8B": (
        "NemotronH",
        {"layers_block_type": (["linear_attention", "mlp"] * 3 + ["linear_attention", "full_attention", "mlp"]) * 4},
    ),
    "GPT-2": ("GPT2", {}),
    "opt-350m": ("OPT", {"hidden_size": 1024, "word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "pythia-1.4b": (
        "GPTNeoX",
        {"hidden_size": 2048, "rotary_pct": 0.25, "use_parallel_residual": True, "num_hidden_layers": 24},
    ),
    "bloom-560m": ("Bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16}),
}
_TEXT = ("Qwen3_5", "Gemma3", "Gemma3n", "Gemma4")
_CLASSES = {"GPT2": "GPT2LMHeadModel"}


def configuration(name: str) -> tuple[type[Any], Any]:
    """The causal class, and its configuration."""
    stem, fields = CONFIGURATIONS[name]
    config = getattr(transformers, f"{stem}TextConfig" if stem in _TEXT else f"{stem}Config")(**fields)
    return getattr(transformers, _CLASSES.get(stem, f"{stem}ForCausalLM")), config
