"""A small model of a class, its plain gradients, and how far those in chunks are from them."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from slimgrad import api
from slimgrad.errors import ModelError
from slimgrad.hf.batch import PER_TOKEN
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.forwards import install, uninstall
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.step import BaseStep
from slimgrad.hf.widen import widened

FLOOR = 1e-6  # of all gradients together: what a gradient that is zero by mathematics is measured against
_MOST_PARAMETERS = 30_000_000
_SMALL_STD = 0.05  # weights with less are drawn anew: zero or tiny ones would hide gradients
_STD = 0.15
_NOISE = 0.05  # on vectors and numbers (norms, gates, decays), none of which is then one or zero
# experts one after the other, since grouped kernels have no float64; attention that a class does not have is its own
_HOW: tuple[dict[str, str], ...] = (
    {"experts_implementation": "eager"},
    {},
    {"experts_implementation": "eager", "attn_implementation": "eager"},
    {"attn_implementation": "eager"},
)


@contextmanager
def undisturbed() -> Generator[None]:
    """The caller's random numbers, and transformers' verbosity, stay as they are."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            transformers.logging.set_verbosity(level)


def built(kind: type[Any], config: Any, attention: str) -> Any:
    """The class in float64, for training, its weights large enough for every gradient to be seen, without dropout.

    Raises:
        Exception: what the class raises for a configuration that does not fit it.
    """
    errors: list[Exception] = []
    for how in _HOW:
        options = {"attn_implementation": attention, **how}
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in kind._from_config(config, **options).parameters())
            if count > _MOST_PARAMETERS:
                raise ModelError(f"its small configuration still has {count:,} parameters")
            with widened():
                model = kind._from_config(config, **options)
            break
        except Exception as error:  # noqa: BLE001  # whatever a class raises for options that it does not know
            errors.append(error)
    else:
        raise errors[-1]
    model = model.double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for p in model.parameters():
            if not bool(p.isfinite().all()) or (p.dim() >= 2 and p.numel() > 1 and p.std() < _SMALL_STD):
                p.normal_(0, _STD)
            elif p.dim() < 2:
                p += torch.randn_like(p) * _NOISE
    text = model.config.get_text_config()
    if model.get_output_embeddings() is None and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # heads that look for a row's last token want one
    return model


class Plain(NamedTuple):
    """Plain backpropagation's loss and gradients of a small model on some tokens."""

    model: Any
    tokens: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    def error(self) -> float:
        """The largest relative error of the gradients that the model's parameters have now, which are taken away."""
        total = torch.stack([g.norm() for g in self.gradients.values()]).norm().item()
        worst = 0.0
        for name, p in self.model.named_parameters():
            expected = self.gradients.get(name)
            got, p.grad = p.grad, None
            if expected is None and got is None:
                continue
            wanted = torch.zeros_like(p) if expected is None else expected
            distance = ((0 if got is None else got) - wanted).norm() / max(wanted.norm().item(), FLOOR * total)
            worst = max(worst, distance.item() if distance.isfinite() else float("inf"))
        return worst


def plain(model: Any, tokens: Tensor) -> Plain:
    """The model's own whole pass, and its backward pass."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, tokens)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Plain(model, tokens, loss.detach(), gradients)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """A language model's own loss; of others a weighted sum of what they return."""
    if model.get_output_embeddings() is not None and "labels" in inspect.signature(type(model).forward).parameters:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss
    found = model(input_ids=tokens, use_cache=False)
    x = found["last_hidden_state"] if "last_hidden_state" in found else found[0]
    return (x * torch.linspace(-1, 1, x.numel()).view_as(x).mul(9).sin()).sum()


def error(expected: Plain, known: Certificate, chunk: int) -> float:
    """Of the loss and every gradient, run as the certificate says."""
    tried = replace(known, takes=list(PER_TOKEN), checkpoints=True)  # which is what is found out
    install(expected.model, tried, chunk=chunk).step.around = widened
    try:
        loss = loss_of(expected.model, expected.tokens)
        torch.autograd.backward(loss)
    finally:
        uninstall(expected.model)
    distance = ((loss.detach() - expected.loss) / expected.loss).abs().item()
    return max(expected.error(), distance if distance == distance else float("inf"))


def outputs_differ(step: BaseStep, given: dict[str, Tensor], chunk: int, tolerance: float) -> bool:
    """Whether the base's outputs in chunks are others than those of its whole pass."""
    rows, time = next(iter(given.values())).shape[:2]
    state: Any = step.initial_state(rows)
    if depends_on_length(step.base):
        state["total"] = time
    with torch.no_grad():
        whole = step.original(**given, use_cache=False).last_hidden_state
        parts = api.outputs(step, given, chunk=chunk, state=state)["last_hidden_state"]
    return not bool((whole - parts).norm() <= tolerance * whole.norm())
