"""A model's own configuration made small: a few narrow layers of each kind it has, a window of 7, everything else kept.

The small model runs the same code as the large one. What decides how it runs (layer kinds, activations, scales, rope
types, options) stays; what decides how large it is shrinks, by the names that configurations use for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

WINDOW = 7  # tokens of a sliding window
ORIGINAL = 24  # tokens up to which a rotary embedding that depends on the length is as it was trained
LAYERS = 4  # at least, if the model has as many
_MOST_LAYERS = 8
VOCABULARY = 97
_WIDTH, _HEADS, _KEY_HEADS, _HEAD, _INNER, _EXPERT, _EXPERTS, _STATE = 32, 4, 2, 8, 48, 24, 4, 8

# by value, the names of fields that have it
_SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (
        _WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size embedding_dim word_embed_proj_dim hidden_size_q "
        "lru_width block_dim attention_hidden_size",
    ),
    (_HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads linear_num_value_heads"),
    (_KEY_HEADS, "num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads"),
    (
        _HEAD,
        "head_dim kv_channels global_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim "
        "qk_nope_head_dim v_head_dim index_head_dim mamba_d_head mamba_head_dim",
    ),
    (12, "qk_head_dim"),
    (
        4,
        "qk_rope_head_dim rotary_dim mamba_chunk_size chunk_size mamba_dt_rank time_step_rank adapter_rank laurel_rank "
        "hidden_size_per_layer_input",
    ),
    (16, "q_lora_rank kv_lora_rank"),
    (_INNER, "decoder_ffn_dim encoder_ffn_dim ffn_dim intermediate_size ffn_hidden_size n_inner intermediate_size_mlp"),
    (
        _EXPERT,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size",
    ),
    (_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k mamba_expand expand altup_num_inputs "
        "index_n_heads encoder_layers attn_layer_period expert_layer_period num_blocks hc_mult n_hash",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_shared_experts mamba_n_groups n_groups first_k_dense_replace "
        "dense_layers num_dense_layers num_mem_blocks attn_layer_offset expert_layer_offset "
        "num_ln_in_parallel_attn n_langs mup_width_multiplier",
    ),
    (_STATE, "state_size ssm_state_size mamba_d_state mamba_n_heads mamba_num_heads block_size attention_chunk_size"),
    (64, "mamba_d_ssm"),
    (3, "conv_L_cache"),
    (1_000, "index_topk"),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len seq_length context_length max_target_positions"),
    (WINDOW, "sliding_window attention_window_size window_size sliding_window_size"),
    (0, "num_kv_shared_layers num_nextn_predict_layers pad_token_id"),
)
SIZES = {name: value for value, names in _SIZES for name in names.split()}
# nothing random, so that two passes can be compared
_DROPOUTS = (
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout hidden_dropout_prob emb_pdrop "
    "attention_probs_dropout_prob activation_dropout residual_dropout embedding_dropout layerdrop ffn_dropout "
    "router_jitter_noise input_jitter_noise ffn_dropout_rate resid_dropout classifier_dropout decoder_layerdrop"
)
CALM = dict.fromkeys(_DROPOUTS.split(), 0.0)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_INDICES = ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "full_attention_layers", "attention_layers_idx")
_PARTS = ("text_config", "decoder", "vision_config", "audio_config")
# what a first attempt may lack, tried one after the other
ALTERNATIVES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": _HEADS, "num_kv_heads": _HEADS},
    {"head_dim": _HEAD // 2, "num_key_value_heads": _HEADS},
    {"head_dim": None},
    {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": _HEADS},
    {"n_groups": 2},
    {"qk_rope_head_dim": 8, "head_dim": 8, "num_key_value_heads": _HEADS, "qk_head_dim": 16},
    {"expand": 2, "num_heads": 8},
)


def shrunk(config: Any, alternative: dict[str, Any]) -> Any:
    """A small configuration of the same class.

    Args:
        config: a transformers configuration.
        alternative: one of `ALTERNATIVES`.

    Raises:
        Exception: what the configuration's class raises for fields that do not fit together.
    """
    fields = shrunk_fields(config, alternative)
    kind = type(config)
    errors: list[Exception] = []
    for without in ((), ("head_dim",), ("layer_types",), ("head_dim", "layer_types")):
        try:
            return kind(**{name: value for name, value in copy.deepcopy(fields).items() if name not in without})
        except Exception as error:  # noqa: BLE001  # whatever a configuration's own checks raise
            errors.append(error)
    raise errors[0]


def shrunk_fields(config: Any, alternative: dict[str, Any]) -> dict[str, Any]:
    """The fields of a small configuration, every other one as it is."""
    fields = cast("dict[str, Any]", config.to_dict())
    special = RULES.get(fields.get("model_type", ""), {})
    for name, value in SIZES.items():
        if fields.get(name) is not None or (name == "pad_token_id" and name in fields):
            fields[name] = value
    for name, value in alternative.items():
        if fields.get(name) is not None and name not in special:
            fields[name] = value
    fields = {name: value for name, value in fields.items() if not (value is None and name in alternative)}
    fields.update({name: value for name, value in CALM.items() if fields.get(name) is not None})
    if "is_decoder" in fields and not getattr(config, "is_encoder_decoder", False):
        fields["is_decoder"] = config.is_decoder
    for part in _PARTS:
        inner = getattr(config, part, None)
        if hasattr(inner, "to_dict"):
            fields[part] = shrunk_fields(inner, alternative)
    _shrink_layers(config, fields)
    _shrink_rope(fields)
    fields.update(special)
    for name in ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path"):
        fields.pop(name, None)
    return fields


def _depth(config: Any) -> tuple[str, int] | None:
    for name in _DEPTHS:
        value = config.to_dict().get(name)
        if isinstance(value, int):
            return name, value
    return None


def _shrink_layers(config: Any, fields: dict[str, Any]) -> None:
    """The first layers, until each kind has occurred; or one of each kind, where that takes too many."""
    found = _depth(config)
    if found is None:
        return
    _, depth = found
    per_layer = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == depth and depth > 1}
    kinds = [repr([v[i] for v in per_layer.values()]) for i in range(depth)]
    kinds = [
        f"{kind}{[i in fields[k] for k in _INDICES if isinstance(fields.get(k), list)]}" for i, kind in enumerate(kinds)
    ]
    firsts = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
    kept = list(range(min(depth, max(LAYERS, firsts[-1] + 1))))
    if len(kept) > _MOST_LAYERS:
        kept = sorted({*firsts, *range(min(depth, LAYERS - len(firsts)))})
    for k, v in per_layer.items():
        fields[k] = [v[i] for i in kept]
    for k in _INDICES:
        if isinstance(fields.get(k), list):
            fields[k] = [kept.index(i) for i in fields[k] if i in kept]
    for k in _DEPTHS:
        if isinstance(fields.get(k), int):
            fields[k] = len(kept)


def _shrink_rope(fields: dict[str, Any]) -> None:
    """Thresholds that 44 tokens pass, and one factor per frequency."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    if not isinstance(rope, dict):
        return
    for one in _ropes(cast("dict[str, Any]", rope)):
        kind = one.get("rope_type", one.get("type"))
        if kind == "dynamic":
            fields["max_position_embeddings"] = ORIGINAL
        if "original_max_position_embeddings" in one:
            one["original_max_position_embeddings"] = ORIGINAL
        if "original_max_position_embeddings" in fields:
            fields["original_max_position_embeddings"] = ORIGINAL
        head = fields.get("head_dim") or fields.get("hidden_size", _WIDTH) // fields.get("num_attention_heads", _HEADS)
        head = fields.get("qk_rope_head_dim") or head
        share = one.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) or 1.0
        for name in ("short_factor", "long_factor"):
            if isinstance(one.get(name), list):
                one[name] = one[name][: int(head * share) // 2]
        if isinstance(one.get("mrope_section"), list):
            one["mrope_section"] = [2, 1, 1]


def _ropes(rope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if any(isinstance(value, dict) for value in rope.values()):
        for value in rope.values():
            if isinstance(value, dict):
                yield cast("dict[str, Any]", value)
    else:
        yield rope


# by model type, what the names above do not say
RULES: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": _KEY_HEADS},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "num_blocks": 2, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "num_hidden_layers": 3},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 2},
    "zaya": {"num_experts_per_tok": 1, "moe_topk": 1},
    "kimi_linear": {"num_key_value_heads": _HEADS},
    "deepseek_v2": {"num_key_value_heads": _HEADS},
    "bailing_hybrid": {"num_key_value_heads": _HEADS, "num_group": 1},
    "xlm": {"emb_dim": _WIDTH, "n_langs": 1, "causal": True},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
}
