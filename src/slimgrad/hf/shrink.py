"""A model's own configuration made small: a few narrow layers of each kind it has, a window of 7, everything else kept.

The small model runs the same code as the large one. What decides how it runs (layer kinds, activations, scales, rope
types, options) stays; what decides how large it is shrinks, by the names that configurations use for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

Fields = dict[str, Any]
WINDOW = 7  # tokens of a sliding window
ORIGINAL = 24  # tokens up to which a rotary embedding that depends on the length is as it was trained
LAYERS = 4  # at least, if the model has as many
_MOST_LAYERS = 8
VOCABULARY = 97
_WIDTH, _HEADS, _KEY_HEADS, _HEAD, _INNER, _EXPERT, _EXPERTS, _STATE = 32, 4, 2, 8, 48, 24, 4, 8

# by value, the names of fields that have at most it
_SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    (
        _WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size embedding_dim word_embed_proj_dim hidden_size_q "
        "lru_width block_dim attention_hidden_size emb_dim",
    ),
    (
        _HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "linear_num_value_heads linear_num_heads",
    ),
    (_KEY_HEADS, "num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads"),
    (
        _HEAD,
        "head_dim kv_channels global_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
        "qk_nope_head_dim v_head_dim index_head_dim mamba_d_head mamba_head_dim mamba_headdim d_head",
    ),
    (12, "qk_head_dim"),
    (
        4,
        "qk_rope_head_dim rotary_dim mamba_chunk_size chunk_size mamba_dt_rank time_step_rank adapter_rank laurel_rank "
        "hidden_size_per_layer_input",
    ),
    (16, "q_lora_rank kv_lora_rank o_lora_rank"),
    (
        _INNER,
        "d_inner decoder_ffn_dim encoder_ffn_dim ffn_dim intermediate_size ffn_hidden_size n_inner "
        "intermediate_size_mlp",
    ),
    (
        _EXPERT,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    ),
    (_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k mamba_expand expand altup_num_inputs "
        "attn_layer_period expert_layer_period num_blocks hc_mult n_hash n_group num_expert_group mamba_n_groups "
        "mamba_ngroups n_groups num_mem_blocks o_groups",
    ),
    (
        1,
        "topk_group n_shared_experts num_shared_experts first_k_dense_replace dense_layers num_dense_layers "
        "attn_layer_offset expert_layer_offset num_ln_in_parallel_attn n_langs",
    ),
    (
        _STATE,
        "state_size ssm_state_size mamba_d_state mamba_n_heads mamba_num_heads n_mamba_heads block_size "
        "attention_chunk_size index_n_heads",
    ),
    (64, "mamba_d_ssm"),
    (9, "index_topk keep_window_size"),  # of the tokens before, so that it matters which are chosen
    (2, "index_topk_blocks"),
    (4, "index_block_size"),
    (8, "floor_scale log_scaling_n_floor rel_extent"),  # tokens from which on something is scaled or left out
    (2 * WINDOW, "local_attention"),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_seq_len seq_length context_length max_target_positions "
        "max_source_positions model_max_length",
    ),
    (WINDOW, "sliding_window attention_window_size window_size sliding_window_size"),
    (0, "num_nextn_predict_layers pad_token_id"),
)
SIZES = {name: value for value, names in _SIZES for name in names.split()}
# heads that share keys do so in the small model, and those that do not, do not
_SHARED_HEADS = (
    ("num_key_value_heads", "num_attention_heads"),
    ("num_kv_heads", "num_attention_heads"),
    ("num_query_groups", "num_attention_heads"),
    ("linear_num_key_heads", "linear_num_value_heads"),
)
# nothing random, so that two passes can be compared
_DROPOUTS = (
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout hidden_dropout_prob emb_pdrop "
    "attention_probs_dropout_prob activation_dropout residual_dropout embedding_dropout layerdrop ffn_dropout "
    "router_jitter_noise input_jitter_noise ffn_dropout_rate resid_dropout classifier_dropout decoder_layerdrop"
)
CALM = frozenset(_DROPOUTS.split())
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_INDICES = (
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "full_attention_layers",
    "attention_layers_idx",
    "cross_attention_layers",
    "mlp_only_layers",
    "moe_layers",
)
_SHARING = "num_kv_shared_layers"  # the last layers, which read the keys of others
_PARTS = ("text_config", "decoder", "vision_config", "audio_config")
LEFT_OUT = (
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "quantization_config",
)
# what a first attempt may lack, tried one after the other
ALTERNATIVES: tuple[Fields, ...] = (
    {},
    {"num_key_value_heads": _HEADS, "num_kv_heads": _HEADS},
    {"head_dim": _HEAD // 2, "num_key_value_heads": _HEADS},
    {"head_dim": None},
    {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": _HEADS},
    {"n_groups": 2},
    {"qk_rope_head_dim": 8, "head_dim": 8, "num_key_value_heads": _HEADS, "qk_head_dim": 16},
    {"expand": 2, "num_heads": 8},
)


def shrunk(config: Any, alternative: Fields) -> Any:
    """A small configuration of the same class.

    Args:
        config: a transformers configuration.
        alternative: one of `ALTERNATIVES`.

    Raises:
        Exception: what the configuration's class raises for fields that do not fit together.
    """
    fields, kind = shrunk_fields(config, alternative), type(config)
    try:
        return kind(**copy.deepcopy(fields))
    except Exception:  # noqa: BLE001  # whatever a configuration's own checks raise
        fields.pop("head_dim", None)
        return kind(**fields)


def shrunk_fields(config: Any, alternative: Fields) -> Fields:
    """The fields of a small configuration, every other one as it is."""
    fields = _shrink_sizes(copy.deepcopy(cast("dict[str, Any]", config.to_dict())))
    for name, value in alternative.items():
        if fields.get(name) is not None:
            fields[name] = value
    fields = {name: value for name, value in fields.items() if not (value is None and name in alternative)}
    fields.update({name: 0.0 for name in CALM if fields.get(name) is not None})
    for part in _PARTS:
        inner = getattr(config, part, None)
        if hasattr(inner, "to_dict"):
            fields[part] = shrunk_fields(inner, alternative)
    _shrink_layers(config, fields)
    _shrink_rope(fields)
    fields.update(_by_type(fields))
    for name in LEFT_OUT:
        fields.pop(name, None)
    return fields


def _shrink_sizes(fields: Fields) -> Fields:
    equal = [few for few, many in _SHARED_HEADS if fields.get(few) is not None and fields[few] == fields.get(many)]
    small = {name: _at_most(SIZES[name], value) if name in SIZES else value for name, value in fields.items()}
    return {**small, **dict.fromkeys(equal, _HEADS)}


def _at_most(size: int, value: Any) -> Any:
    """A size, per layer or not; anything else (None: derived, or switched off) stays."""
    if isinstance(value, list):
        return size
    return min(size, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _depth(config: Any) -> int | None:
    for name in _DEPTHS:
        value = config.to_dict().get(name, getattr(config, name, None))
        if isinstance(value, int):
            return value
    return None


def _shrink_layers(config: Any, fields: Fields) -> None:
    """The first layers, and two of each kind; or one of each kind, where that is too many."""
    depth = _depth(config)
    if depth is None:
        return
    indices = [
        k for k in _INDICES if isinstance(fields.get(k), list) and not any(isinstance(x, bool) for x in fields[k])
    ]
    per_layer = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == depth > 1 and k not in indices}
    options = {int(index): value for index, value in (fields.get("per_layer_config") or {}).items()}
    own = depth - (fields.get(_SHARING) or 0)  # layers with keys of their own

    def kind(i: int) -> str:
        return repr([*(v[i] for v in per_layer.values()), *(i in fields[k] for k in indices), options.get(i), i >= own])

    kinds = [kind(i) for i in range(depth)]
    found = {one: [i for i in range(depth) if kinds[i] == one] for one in kinds}
    kept = sorted({*range(min(depth, LAYERS)), *(i for where in found.values() for i in where[:2])})
    if len(kept) > _MOST_LAYERS:
        kept = sorted(where[0] for where in found.values())
    for k, v in per_layer.items():
        fields[k] = [v[i] for i in kept]
    for k in indices:
        fields[k] = [kept.index(i) for i in fields[k] if i in kept]
    for k in _DEPTHS:
        if isinstance(fields.get(k), int):
            fields[k] = len(kept)
    if options:
        fields["per_layer_config"] = {at: _shrink_sizes(options[i]) for at, i in enumerate(kept) if i in options}
    if fields.get(_SHARING):
        fields[_SHARING] = sum(i >= own for i in kept)
    if isinstance(fields.get("encoder_layers"), int):  # a decoder's cache may have as many
        fields["encoder_layers"] = min(fields["encoder_layers"], len(kept))


def _shrink_rope(fields: Fields) -> None:
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


def _by_type(fields: Fields) -> Fields:
    """What the names above do not say, for some model types."""
    kind = fields.get("model_type")
    if kind in ("zamba", "zamba2"):
        wide = {"attention_hidden_size": 2 * _WIDTH, "attention_head_dim": 2 * _WIDTH // _HEADS}
        return {**wide, "n_mamba_heads": 2} if kind == "zamba" else wide
    if kind == "xlstm":
        return {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 8}  # its cache rounds widths up to 64
    if kind == "mamba2":
        return {"num_heads": 8, "head_dim": 8}
    if kind == "gpt_neo":
        return {"attention_types": [[[layer], 1] for layer in fields["attention_layers"]]}
    if kind == "hrm_text":  # a layer for each pass through a stack
        return {"num_layers_per_stack": 1, "num_hidden_layers": fields["H_cycles"] * (fields["L_cycles"] + 1)}
    if kind == "longcat_flash":
        return {"num_layers": 2, "num_hidden_layers": 2}
    if kind == "dbrx":
        experts = {"ffn_hidden_size": _EXPERT, "moe_num_experts": _EXPERTS, "moe_top_k": 2}
        return {
            "attn_config": {**fields["attn_config"], "kv_n_heads": _KEY_HEADS},
            "ffn_config": {**fields["ffn_config"], **experts},
        }
    if kind == "deepseek_v4":  # so that more entries are compressed than are chosen
        rates = cast("dict[str, int]", fields["compress_rates"])
        return {"compress_rates": {name: min(rate, 2 if "sparse" in name else 4) for name, rate in rates.items()}}
    return {}
