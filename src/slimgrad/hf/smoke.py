"""A look at the model itself, once: its hidden states whole against in chunks, forward, over a few tokens.

The certificate is of the class, small and in float64. What it cannot see is what was put on this model: weights that
overflow, adapters, replaced layers, hooks, kernels of this device. Here a difference is measured against those between
several ways to run the model whole, which are all right: eager against sdpa, and with every layer's output off by a
rounding error at random (Monte Carlo arithmetic: Parker, 1997), which shows how much the model makes of such errors.

The model is looked at as it is trained, in training mode, with constants in the place of random draws. What is drawn
once for a whole sequence (a layer that is dropped, a mask along time) chunks would draw anew: that is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad import api
from slimgrad.budget.probe import as_it_was
from slimgrad.errors import ModelError
from slimgrad.hf.attention import attending, configs_of, is_transformers_own
from slimgrad.hf.batch import padding_token
from slimgrad.hf.configured import refuse_layers_unlike
from slimgrad.hf.draws import ConstantDraws
from slimgrad.hf.head import LogitsOf
from slimgrad.hf.put_on import nothing_captured
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.step import BaseStep
from slimgrad.modes import in_mode
from slimgrad.sweep.cut import Cut
from slimgrad.sweep.random import seeded

_TOKENS, _CHUNK = 67, 23  # primes: what is drawn for each token is of other sizes whole than in chunks
_GOLDEN = (math.sqrt(5) - 1) / 2
_TIMES_YARDSTICK = 10
_HEAD_SHAPE = 2, 24  # rows, tokens
# Relatively, of two losses that are the same products. Measured over seven kinds of model: at most 2e-7, in 16 bits
# too; of a loss that the class itself sums in 16 bits 2e-4, to which the dtype's own floor applies
_HEAD_CLOSE, _HEAD_CLOSE_IN_16_BITS = 1e-5, 1e-4
_FLOORS = {torch.float16: 4, torch.bfloat16: 4}  # in units of the dtype's own rounding; else 30 of float32's


LossOf = Callable[[Tensor, Tensor], Tensor]


def require_same_outputs(inner: nn.Module, step: BaseStep) -> None:
    """Compare the base's hidden states whole and in chunks, on the model's own weights.

    Modes, generators and gradients are as they were.

    Args:
        inner: the model.
        step: its base as a causal step, as it is trained.

    Raises:
        ModelError: they differ by more than rounding, its layers are not those of its configuration, or it draws
            something once for a whole sequence.

    Cost: five forward passes over 67 tokens, ten where draws are not known to be any of torch's usual ones.
    """
    refuse_layers_unlike(inner)
    if any(map(is_elsewhere, step.base.parameters())):
        raise ModelError(
            "the model's weights are not all here (on the meta device, or sharded), so that it cannot be run for a "
            "check. Enable it before it is sharded, or slimgrad.hf.enable(model, check=False)"
        )
    found = _passes(inner, step, training=True)
    if found is None:  # something is drawn that cannot be held constant
        found = _passes(inner, step, training=False)
        assert found is not None
    own, others, chunks = found
    if not bool(own.isfinite().all()):
        raise ModelError(
            f"hidden states of this {type(inner).__name__} are not finite in one pass over {own.shape[1]} random "
            "tokens already, without slimgrad; expected weights that can be trained"
        )
    yardstick = max(_distance(other, own) for other in others)
    allowed, off = max(_TIMES_YARDSTICK * yardstick, _floor(own.dtype)), _distance(chunks, own)
    if not off <= allowed:
        raise ModelError(
            f"hidden states of this {type(inner).__name__} in chunks differ from those in one pass by {off:.1e}, "
            f"where {allowed:.1e} is expected of rounding ({own.dtype}; whole in other ways: {yardstick:.1e}). "
            "Its class is exact, so something on this model looks across tokens: an adapter, a replaced layer, a hook. "
            "Without this check: slimgrad.hf.enable(model, check=False)"
        )


def is_elsewhere(x: Tensor) -> bool:
    """Whether a weight is not all here: on the meta device, or sharded."""
    return x.device.type == "meta" or hasattr(x, "device_mesh")


def head_agrees(base: nn.Module, head: Any, whole: LossOf, pieces: LossOf, logits_of: LogitsOf | None) -> bool:
    """Whether the head in pieces gives the model's own loss, and its logits do not look across tokens.

    What the loss depends on beside the configuration (a subclass' attribute, a hook on the head, a replaced head) shows
    here. Losses are compared in one piece, where both are the same products; logits also of two pieces.

    Args:
        base: the base model.
        head: its output embeddings, or None.
        whole, pieces: both losses of hidden states `[batch, time, width]` and labels `[batch, time]`.
        logits_of: the model's own head; None: a linear layer, of which there is nothing to see.

    Raises:
        Exception: what any of these raises.

    Cost: four passes of 48 tokens through the head, and one back.
    """
    weight = getattr(head, "weight", None)
    weight = next(base.parameters()) if weight is None else weight
    (rows, time), config = _HEAD_SHAPE, cast(Any, base).config.get_text_config()
    width = weight.shape[-1] if weight.is_floating_point() and weight.dim() == 2 else config.hidden_size
    numbers = torch.arange(rows * time * width, dtype=torch.float64).mul_(_GOLDEN).frac_().sub_(0.5)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    hidden = numbers.mul_(3).view(rows, time, width).to(weight.device, dtype)
    labels = torch.arange(rows * time, device=weight.device).view(rows, time) % config.vocab_size
    with as_it_was(base), seeded(0, weight.device), ConstantDraws():
        with torch.no_grad():
            own = whole(hidden, labels)
            logits = parts = hidden
            if logits_of is not None:
                logits = logits_of(hidden)
                parts = torch.cat([logits_of(x) for x in hidden.split(time // 2 + 1, 1)], 1)
        with torch.enable_grad():  # with a graph, in which a gradient that would be lost is found
            found = pieces(hidden.requires_grad_(), labels)
    is_wide = logits.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(weight.device.type)
    close = _HEAD_CLOSE if is_wide else _HEAD_CLOSE_IN_16_BITS
    if own.dtype in _FLOORS:  # a loss of the class' own that is summed in 16 bits
        close = _floor(own.dtype)
    return _distance(found, own) <= close and _distance(parts, logits) <= _floor(logits.dtype)


def _floor(dtype: torch.dtype) -> float:
    """What is rounding at least, relatively."""
    return _FLOORS.get(dtype, 0) * torch.finfo(dtype).eps or 30 * torch.finfo(torch.float32).eps


def _passes(inner: nn.Module, step: BaseStep, *, training: bool) -> tuple[Tensor, list[Tensor], Tensor] | None:
    """Hidden states whole, whole in other ways, and in chunks; None where draws of training mode stay random."""
    base, device = step.base, next(step.base.parameters()).device
    whole, parts = ConstantDraws(), ConstantDraws()
    # bitsandbytes repacks weights for good when it runs in eval mode on a CPU; statistics may be frozen on purpose
    modules = [m for m in base.modules() if not type(m).__module__.startswith("bitsandbytes")]
    modules = [m for m in modules if not isinstance(m, nn.modules.batchnorm._NormBase)]  # pyright: ignore[reportPrivateUsage]
    with ExitStack() as stack:
        for one in (torch.no_grad(), as_it_was(base), seeded(0, device), _without_checkpointing(base)):
            stack.enter_context(one)
        if not (training and base.training):  # else each module is in its own mode
            stack.enter_context(in_mode(modules, training=training))
        if "torch._dynamo" in sys.modules:  # compiled code has no place for other draws
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        inputs = {"input_ids": _tokens(step, device)}
        total = inputs["input_ids"].shape[1]
        stack.enter_context(nothing_captured(base, {total, _CHUNK, total % _CHUNK, total % _CHUNK + _CHUNK}))
        state = None
        if depends_on_length(base):
            state = {**step.initial_state(1), "total": total}
        with whole if training else nullcontext():
            own = _whole(step, inputs, None)
        with ConstantDraws() if training else nullcontext():
            others = [_whole(step, inputs, way) for way in _ways(inner)]
            with _rounding_at_random(base):
                others.append(_whole(step, inputs, None))
        with parts if training else nullcontext():
            chunks = api.outputs(step, inputs, chunk=_CHUNK, state=state)["last_hidden_state"]
        chunks = chunks.clone()
        own, others = own.clone(), [x.clone() for x in others]  # a hook may have been handed these themselves
    shared = _once_for_a_sequence(whole, parts, len(Cut(total, _CHUNK)), step.config)
    if shared:
        raise ModelError(
            f"this {type(inner).__name__} draws something at random once for a whole sequence ({', '.join(shared)}): a "
            "layer that is dropped (layerdrop, module_dropout), a mask of weights, or one that all tokens share. Each "
            "chunk would draw it anew. Expected draws per token, or none: set that dropout to zero"
        )
    if whole.others or parts.others:
        return None
    return own, others, chunks


def _once_for_a_sequence(whole: ConstantDraws, parts: ConstantDraws, chunks: int, config: Any) -> list[str]:
    """The operations that drew as many numbers in each chunk as in the whole pass.

    Models that may drop layers draw for each of them, also where the probability is zero.
    """
    found = {key: times for key, times in whole.seen.items() if parts.seen[key] >= times * chunks}
    names = [name for name in vars(config) if name.endswith("layerdrop")]
    if names and not any(getattr(config, name) for name in names):
        layers = int(config.get_text_config().num_hidden_layers)
        found = {key: times for key, times in found.items() if key != ("rand", 1) or times > layers}
    return sorted({name for name, _ in found})


@contextmanager
def _without_checkpointing(base: nn.Module) -> Generator[None]:
    """Activation checkpointing set aside, which without gradients does nothing but warn."""
    flagged = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in flagged:
            cast(Any, module).gradient_checkpointing = False
        yield
    finally:
        for module in flagged:
            cast(Any, module).gradient_checkpointing = True


@contextmanager
def _rounding_at_random(base: nn.Module) -> Generator[None]:
    """Within the block what every innermost layer gives is off by one rounding error at most.

    The numbers are no draws, which are constant there: multiples of the golden ratio, others for each layer.
    """
    used = 0

    def off(module: nn.Module, given: Any, output: Any) -> Any:
        nonlocal used
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        numbers = torch.arange(used, used + output.numel(), dtype=torch.float64).mul_(_GOLDEN).frac_().sub_(0.5)
        used += output.numel()
        return output * (1 + torch.finfo(output.dtype).eps * numbers.view(output.shape).to(output))

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


def _ways(inner: nn.Module) -> list[str]:
    """Other attention that is right as well, beside the model's own."""
    own = cast(Any, inner).config._attn_implementation
    if not is_transformers_own(own):  # it may compute what no other does
        return []
    if own != "eager":
        return ["eager"]
    return ["sdpa"] if getattr(inner, "_supports_sdpa", False) else []


def _whole(step: BaseStep, inputs: dict[str, Tensor], attention: str | None) -> Tensor:
    with step.around(), attending(configs_of(step.base), attention):
        return step.original(**inputs, use_cache=False).last_hidden_state


def _distance(a: Tensor, b: Tensor) -> float:
    wide = torch.promote_types(b.dtype, torch.float32)
    return ((a.to(wide) - b.to(wide)).norm() / b.to(wide).norm()).item()
