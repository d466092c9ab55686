"""`enable`: a Hugging Face model whose training runs in chunks, in whichever trainer it is used."""

from __future__ import annotations

from torch import nn

from slimgrad.call.arguments import DEFAULT_CHUNK
from slimgrad.errors import InputError, ModelError
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.certifying import certify
from slimgrad.hf.forwards import enabled_below, install, uninstall
from slimgrad.sweep.schedules.base import Schedule


def enable(
    model: nn.Module,
    *,
    chunk: int = DEFAULT_CHUNK,
    schedule: Schedule | None = None,
    certificate: Certificate | None = None,
) -> nn.Module:
    """Train `model` in chunks from now on: exact gradients, in memory of one chunk's graph.

    Works with the model's own `loss.backward()`, transformers' Trainer, TRL's trainers, Accelerate, PEFT (before or
    after `get_peft_model`), DistributedDataParallel around the model, and FSDP2 with the root as its unit.

    Args:
        model: a transformers model, or a PEFT model around one.
        chunk: tokens whose graph lives at once.
        schedule: how states are found again (see docs/schedules.md); `Rebuild(rows="host")` keeps keys and values in
            host memory.
        certificate: of `certify`; None: looked up, or made in about two seconds.

    Returns:
        `model` itself.

    Raises:
        ModelError: the model's class is not exact in chunks, or nobody can say: the reason, and what to do.
        InputError: it is enabled already.

    Cost: plain backpropagation and one more forward pass of the base model; memory of one chunk's graph, the state
    (keys and values for full attention, linear in the length), hidden states `[batch, time, width]` and their gradient.

    Example:
        >>> slimgrad.hf.enable(model, chunk=4096)
        >>> model(input_ids=ids, labels=ids).loss.backward()
    """
    inner = _inner(model)
    if any(enabled_below(m.__dict__["forward"]) for m in inner.modules() if "forward" in m.__dict__):
        raise InputError("the model is enabled already; expected slimgrad.hf.disable(model) before it is enabled anew")
    _refuse_hooks(inner)
    certificate = certificate or certify(inner)
    certificate.require_exact()
    install(inner, certificate, chunk=chunk, schedule=schedule)
    return model


def disable(model: nn.Module) -> nn.Module:
    """The model as it was before `enable`.

    Raises:
        InputError: it is not enabled.
    """
    if not uninstall(_inner(model)):
        raise InputError("the model is not enabled; expected one that slimgrad.hf.enable was called on")
    return model


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model within PEFT's."""
    get = getattr(model, "get_base_model", None)
    inner = get() if callable(get) else model
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        raise ModelError(f"expected a transformers model, got {type(model).__name__}")
    return inner


def _refuse_hooks(inner: nn.Module) -> None:
    for name, module in inner.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{name or type(inner).__name__} has a hook of Accelerate's that moves weights between devices "
                "(device_map, offload), so a chunk's gradient would go to copies. Load the model on one device"
            )
