"""`enable`: a Hugging Face model whose training runs in chunks, in whichever trainer it is used."""

from __future__ import annotations

from torch import nn

from slimgrad.budget.size import parse_bytes
from slimgrad.errors import InputError, ModelError
from slimgrad.hf.base import refuse_modules
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.certifying import certify, inner_model
from slimgrad.hf.forwards import enabled, install, uninstall
from slimgrad.sweep.schedules.base import Schedule


def enable(
    model: nn.Module,
    *,
    chunk: int | None = None,
    memory: int | str | None = None,
    schedule: Schedule | None = None,
    certificate: Certificate | None = None,
    check: bool = True,
) -> nn.Module:
    """Train `model` in chunks from now on: exact gradients, in memory of one chunk's graph.

    Works with the model's own `loss.backward()`, transformers' Trainer, TRL's trainers, Accelerate, PEFT (before or
    after `get_peft_model`), DistributedDataParallel around the model, and FSDP2 with the root as its unit.
    Best before Accelerate's `prepare`: after it a loss of the model's own takes its head whole, since autocast is in a
    forward that was there before.

    Args:
        model: a transformers model, or a PEFT model around one.
        chunk: tokens whose graph lives at once.
        memory: in its place, what the process may hold, weights included (on a GPU: what torch's allocator reserves):
            bytes, or text as "8GiB". The fastest plan within it is chosen by measurements, made at the first batch, and
            on a CPU anew where the process has come to hold more (an optimiser's moments). With neither, sequences of
            more than 4,096 tokens have what is free.
        schedule: how states are found again (see docs/schedules.md); `Rebuild(rows="host")` keeps keys and values in
            host memory.
        certificate: of `certify`; None: looked up, or made in about two seconds.
        check: also compare the model itself, with its weights and what has been put on it, whole and in chunks, over 67
            tokens forward (see `smoke`).

    Returns:
        `model` itself.

    Raises:
        ModelError: the model's class is not exact in chunks, or nobody can say, or this model is not: the reason, and
            what to do.
        InputError: it is enabled already.

    Cost: plain backpropagation and one more forward pass of the base model; memory of one chunk's graph, the state
    (keys and values for full attention, linear in the length), hidden states `[batch, time, width]` and their gradient.

    Example:
        >>> slimgrad.hf.enable(model, chunk=4096)
        >>> model(input_ids=ids, labels=ids).loss.backward()
    """
    inner = inner_model(model)
    if enabled(inner):
        raise InputError("the model is enabled already; expected slimgrad.hf.disable(model) before it is enabled anew")
    if chunk is not None and memory is not None:
        raise InputError("chunk= and memory=: expected one of them. memory= chooses the chunk")
    if chunk is not None and (type(chunk) is not int or chunk < 2):
        raise InputError(
            f"chunk={chunk!r}: expected a whole number, at least 2, since many models take another path for one token "
            "alone"
        )
    if isinstance(memory, str):
        parse_bytes(memory)
    certificate = certificate or certify(inner)
    certificate.require_exact()
    base = inner.get_submodule(certificate.base)
    refuse_modules(base)
    _refuse_wrapped(base)
    on_base = install(inner, certificate, chunk=chunk, memory=memory, schedule=schedule)
    if check:
        try:
            on_base.check(inner)
        except BaseException:
            uninstall(inner)
            raise
    return model


def disable(model: nn.Module) -> nn.Module:
    """The model as it was before `enable`.

    Raises:
        InputError: it is not enabled.
    """
    if not uninstall(inner_model(model)):
        raise InputError("the model is not enabled; expected one that slimgrad.hf.enable was called on")
    return model


def _refuse_wrapped(base: nn.Module) -> None:
    forward = base.__dict__.get("forward")
    if forward is not None and "_slimgrad" not in base.__dict__:
        raise ModelError(
            f"{type(base).__name__} has a forward on its instance ({getattr(forward, '__qualname__', forward)!s:.80}), "
            "which chunks would pass by. Expected slimgrad.hf.enable(model) before whoever wraps the model "
            "(Accelerate's prepare does)"
        )
