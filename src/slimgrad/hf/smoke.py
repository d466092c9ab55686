"""A look at the model itself, once: its hidden states whole against in chunks, forward, over a few tokens.

The certificate is of the class, small and in float64. What it cannot see is what was put on this model: weights that
overflow, adapters, replaced layers, kernels of this device. Here a difference is measured against those between several
ways to run the model whole, which are all right: eager against sdpa, and with every layer's output off by a rounding
error at random (Monte Carlo arithmetic: Parker, 1997), which shows how much the model makes of such errors.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad import api
from slimgrad.errors import ModelError
from slimgrad.hf.attention import attending, configs_of
from slimgrad.hf.batch import padding_token
from slimgrad.hf.configured import refuse_layers_unlike
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.step import BaseStep
from slimgrad.modes import in_eval_mode
from slimgrad.sweep.random import seeded

_TOKENS, _CHUNK = 64, 24
_TIMES_YARDSTICK = 10
_FLOORS = {torch.float16: 4, torch.bfloat16: 4}  # in units of the dtype's own rounding; else 30 of float32's


def require_same_outputs(inner: nn.Module, step: BaseStep) -> None:
    """Compare the base's hidden states whole and in chunks, on the model's own weights.

    Modes, generators and gradients are as they were.

    Args:
        inner: the model.
        step: its base as a causal step, as it is trained.

    Raises:
        ModelError: they differ by more than rounding, or its layers are not those of its configuration.

    Cost: five forward passes over 64 tokens.
    """
    refuse_layers_unlike(inner)
    weights = list(step.base.parameters())
    if any(p.device.type == "meta" or hasattr(p, "device_mesh") for p in weights):
        raise ModelError(
            "the model's weights are not all here (on the meta device, or sharded), so that it cannot be run for a "
            "check. Enable it before it is sharded, or slimgrad.hf.enable(model, check=False)"
        )
    device = weights[0].device
    # layers of bitsandbytes repack their weights for good when they run in eval mode on a CPU
    others = [m for m in step.base.modules() if not type(m).__module__.startswith("bitsandbytes")]
    with torch.no_grad(), seeded(0, device), in_eval_mode(others):
        inputs = {"input_ids": _tokens(step, device)}
        own, *others = [_whole(step, inputs, way) for way in _ways(inner)]
        with _rounding_at_random(step.base):
            others.append(_whole(step, inputs, None))
        state = None
        if depends_on_length(step.base):
            state = {**step.initial_state(1), "total": inputs["input_ids"].shape[1]}
        chunks = api.outputs(step, inputs, chunk=_CHUNK, state=state)["last_hidden_state"]
    if not bool(own.isfinite().all()):
        raise ModelError(
            f"hidden states of this {type(inner).__name__} are not finite in one pass over {own.shape[1]} random "
            "tokens already, without slimgrad; expected weights that can be trained"
        )
    yardstick = max(_distance(other, own) for other in others)
    floor = _FLOORS.get(own.dtype, 0) * torch.finfo(own.dtype).eps or 30 * torch.finfo(torch.float32).eps
    allowed, found = max(_TIMES_YARDSTICK * yardstick, floor), _distance(chunks, own)
    if not found <= allowed:
        raise ModelError(
            f"hidden states of this {type(inner).__name__} in chunks differ from those in one pass by {found:.1e}, "
            f"where {allowed:.1e} is expected of rounding ({own.dtype}; whole in other ways: {yardstick:.1e}). "
            "Its class is exact, so something on this model looks across tokens: an adapter, a replaced layer, a hook. "
            "Without this check: slimgrad.hf.enable(model, check=False)"
        )


@contextmanager
def _rounding_at_random(base: nn.Module) -> Generator[None]:
    """Within the block what every innermost layer gives is off by one rounding error at most."""

    def off(module: nn.Module, given: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        return output * (1 + torch.finfo(output.dtype).eps * (torch.rand_like(output) - 0.5))

    innermost = [module for module in base.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(off) for module in innermost]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(step: BaseStep, device: torch.device) -> Tensor:
    """Random ones, none of which is padding, by which some models count positions."""
    config = step.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or _TOKENS
    tokens = torch.randint(config.vocab_size, (1, min(_TOKENS, most)), device=device)
    padding = padding_token(config)
    return tokens if padding is None else tokens.masked_fill(tokens == padding, (padding + 1) % config.vocab_size)


def _ways(inner: nn.Module) -> list[str | None]:
    """Its own attention (None), and another."""
    own = cast(Any, inner).config._attn_implementation
    if own != "eager":
        return [None, "eager"]
    return [None, "sdpa"] if getattr(inner, "_supports_sdpa", False) else [None]


def _whole(step: BaseStep, inputs: dict[str, Tensor], attention: str | None) -> Tensor:
    with step.around(), attending(configs_of(step.base), attention):
        return step.original(**inputs, use_cache=False).last_hidden_state


def _distance(a: Tensor, b: Tensor) -> float:
    wide = torch.promote_types(b.dtype, torch.float32)
    return ((a.to(wide) - b.to(wide)).norm() / b.to(wide).norm()).item()
