"""Attention of a chunk to what came before: the past without a mask, the chunk itself causal, merged by log-sum-exp.

transformers gives a chunk with a past a mask `[chunk, past + chunk]`, which rules out the fast kernels and repeats keys
and values for grouped queries. Here both parts go through a fused kernel. Softmax over both is exact from their parts:
with `lse = log(exp(lse_1) + exp(lse_2))`, the output is `sum_i exp(lse_i - lse) out_i`; and a kernel's backward pass,
given the merged output and `lse`, yields each part's gradients, since it needs of the softmax no more than these two.

Source: the merge is that of FlashAttention's blocks (Dao et al. 2022, section 3.1).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slimgrad.errors import ModelError
from slimgrad.once import differentiable_once

NAME = "slimgrad"
_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for a layer: `query` `[batch, heads, chunk, dim]`; `key`, `value` `[batch, key heads,
    past + chunk, dim]`. Returns `[batch, chunk, heads, dim]`.

    Raises:
        ModelError: an option (sinks, caps, biases) that this attention does not have; a class that uses one is
            certified with its own attention instead.
    """
    used = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if used or attention_mask is not None or not getattr(module, "is_causal", True):
        came = ", ".join(used) or ("a mask" if attention_mask is not None else "is_causal=False")
        raise ModelError(
            f"attention in chunks was given {came}, which its class was not certified with. Expected causal attention, "
            "as the model's configuration has it: chunks have nothing of what comes later"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None or sliding_window >= key.shape[2] else sliding_window
    if window is None and not dropout and _is_fused(query, value):
        out = cast(Tensor, PastAndChunk.apply(query, key, value, scale))
    else:
        out = _masked(query, key, value, scale, window, dropout)
    return out.transpose(1, 2), None


def _is_fused(query: Tensor, value: Tensor) -> bool:
    """Whether a fused kernel that yields log-sum-exp takes these."""
    if query.shape[-1] != value.shape[-1]:
        return False
    if query.device.type == "cpu":
        return True
    return query.device.type == "cuda" and query.dtype in _HALF and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
    """With a mask, in PyTorch's own attention."""
    chunk, seen = query.shape[2], key.shape[2]
    at = torch.arange(seen - chunk, seen, device=query.device)[:, None]
    other = torch.arange(seen, device=query.device)
    mask = other <= at
    if window is not None:
        mask &= other > at - window
    repeats = query.shape[1] // key.shape[1]
    key, value = _repeated(key, repeats), _repeated(value, repeats)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def _repeated(x: Tensor, times: int) -> Tensor:
    """Keys or values of each head, for all queries that share it."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


class PastAndChunk(torch.autograd.Function):
    """Causal attention of the last `chunk` tokens to all of them; keys and values of the past are never repeated.

    Grouped queries go to the past as more rows of one head, which no mask forbids.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        context, past, repeats = cast(Any, ctx), key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
        own_key, own_value = _repeated(key[:, :, past:], repeats), _repeated(value[:, :, past:], repeats)
        out, lse = _kernel(query, own_key, own_value, scale, causal=True)
        if past:
            grouped = _grouped(query, repeats)
            before, before_lse = _kernel(grouped, key[:, :, :past], value[:, :, :past], scale, causal=False)
            before, before_lse = before.reshape(out.shape), before_lse.reshape(lse.shape)
            merged = torch.logaddexp(lse, before_lse)
            weights = [(x - merged).exp()[..., None] for x in (lse, before_lse)]  # as wide as lse
            out, lse = (out * weights[0] + before * weights[1]).to(out.dtype), merged
        context.save_for_backward(query, key, value, out, lse)
        context.scale, context.past, context.repeats = scale, past, repeats
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        context = cast(Any, ctx)
        query, key, value, out, lse = cast("tuple[Tensor, ...]", context.saved_tensors)
        past, repeats, scale = cast(int, context.past), cast(int, context.repeats), cast(float, context.scale)
        gradient = grad_outputs[0].contiguous()
        own_key, own_value = _repeated(key[:, :, past:], repeats), _repeated(value[:, :, past:], repeats)
        d_query, *own = _kernel_backward(gradient, query, own_key, own_value, out, lse, scale, causal=True)
        own = [_summed(x, repeats) for x in own]
        if not past:
            return d_query, own[0], own[1], None
        whole = [torch.empty_like(x) for x in (key, value)]
        parts = [_grouped(x, repeats) for x in (gradient, query, out)]
        lse = lse.reshape(*lse.shape[:1], key.shape[1], -1).contiguous()
        before = _kernel_backward(
            parts[0], parts[1], key[:, :, :past], value[:, :, :past], parts[2], lse, scale, causal=False
        )
        for into, old, new in zip(whole, before[1:], own, strict=True):
            into[:, :, :past], into[:, :, past:] = old, new
        return d_query + before[0].reshape(d_query.shape), whole[0], whole[1], None


def _grouped(x: Tensor, repeats: int) -> Tensor:
    """`[batch, heads, chunk, dim]` -> `[batch, key heads, repeats * chunk, dim]`."""
    return x if repeats == 1 else x.reshape(x.shape[0], x.shape[1] // repeats, -1, x.shape[3])


def _summed(x: Tensor, repeats: int) -> Tensor:
    """The gradient of what was repeated."""
    return x if repeats == 1 else x.view(x.shape[0], -1, repeats, *x.shape[2:]).sum(2)


def _kernel(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp `[batch, heads, chunk]`."""
    if query.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return out, lse
    found = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _kernel_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, out, lse, 0.0, causal, scale=scale
        )
    nothing = torch.empty(0, dtype=torch.int64, device=query.device)  # of dropout and ragged batches
    return _aten._scaled_dot_product_flash_attention_backward(
        gradient,
        query,
        key,
        value,
        out,
        lse,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        nothing,
        nothing,
        scale=scale,
    )


def configs_of(base: nn.Module) -> list[Any]:
    """The configurations that the modules of `base` read the name of their attention function from."""
    found = {id(c): c for m in base.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


def is_transformers_own(name: str | None) -> bool:
    """Whether an attention function is transformers' (or ours), which computes softmax attention as any other of them:
    one that somebody registered may compute something else.
    """
    function = cast(Any, ALL_ATTENTION_FUNCTIONS).get(name)
    if name is None or function is None or "/" in name:  # eager attention is in a model's own file; a kernel of a hub
        return True
    return function is attention or getattr(function, "__module__", "").split(".")[0] == "transformers"


@contextmanager
def attending(configs: list[Any], name: str | None) -> Generator[None]:
    """Within the block their layers use the attention function `name`; None: their own."""
    before = [c._attn_implementation_internal for c in configs]
    try:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = name or own
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


AttentionInterface.register(NAME, attention)
