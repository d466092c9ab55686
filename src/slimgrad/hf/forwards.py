"""The two forwards that `enable` puts on a model's instance; nothing in transformers is replaced.

That of the base model returns, in training, hidden states whose backward is the reverse sweep: whoever owns head and
loss keeps them. That of the causal model, given labels, takes its head in pieces. Everything else (generation,
evaluation, saving) is the model as it was.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from slimgrad.errors import ModelError
from slimgrad.hf import mends
from slimgrad.hf.base import BaseForward
from slimgrad.hf.causal import CausalForward
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.instance import PLACE
from slimgrad.sweep.schedules.base import Schedule

_USUAL_CHUNK = 1024  # where a budget chooses: windows of as many tokens and more are rows
F_ = TypeVar("F_", bound="BaseForward | CausalForward")


def install(
    inner: nn.Module,
    certificate: Certificate,
    *,
    chunk: int | None = None,
    memory: int | str | None = None,
    schedule: Schedule | None = None,
) -> BaseForward:
    """Replace the forwards, whatever the certificate says; that of the base."""
    step = mends.step_for(inner, certificate, chunk=chunk or _USUAL_CHUNK)
    on_base = _put(BaseForward(step.base, step, certificate, schedule, chunk, memory))
    if step.base is not inner and certificate.head is not None:
        _put(CausalForward(inner, on_base, certificate))
    return on_base


def _put(forward: F_) -> F_:
    """Put a forward on its module; one that somebody has wrapped since it was disabled goes on below the wrapper."""
    module = forward.module
    known = module.__dict__.get(PLACE)
    if known is None:
        module.__dict__[PLACE] = module.forward = forward
    else:
        vars(known).update(vars(forward), previous=known.previous)
        forward = known
    module.__dict__["_replicate_for_data_parallel"] = _refuse_data_parallel
    return forward


def _refuse_data_parallel(*args: Any) -> Any:
    raise ModelError(
        "torch.nn.DataParallel copies the model per device, and the copies would run on the original's weights. "
        "Expected DistributedDataParallel (torchrun), or CUDA_VISIBLE_DEVICES with one device"
    )


def uninstall(inner: nn.Module) -> bool:
    """Put back what was there; whether anything was replaced."""
    found = enabled(inner)
    for ours in found:
        module = ours.module
        if module.__dict__.get("forward") is not ours:  # somebody has wrapped it since: it stays, and passes on
            ours.active = False
        else:
            del module.__dict__[PLACE]
            del module.forward
            if ours.previous is not None:
                module.forward = ours.previous
        del module.__dict__["_replicate_for_data_parallel"]
    for module in inner.modules():
        if isinstance(module.__dict__.get("forward"), mends.MendedForward):
            del module.forward
    return bool(found)


def enabled(model: nn.Module) -> list[BaseForward | CausalForward]:
    """The forwards of ours that are active in `model`."""
    found = [module.__dict__.get(PLACE) for module in model.modules()]
    return [one for one in found if one is not None and one.active]


@contextmanager
def evaluated_in_chunks(model: nn.Module) -> Generator[None]:
    """Within the block an enabled model is swept in eval mode and without gradients as well: a loss over any length
    without its logits, or activations of the whole length.
    """
    forwards = [one for one in enabled(model) if not one.evaluates]
    try:
        for one in forwards:
            one.evaluates = True
        yield
    finally:
        for one in forwards:
            one.evaluates = False
