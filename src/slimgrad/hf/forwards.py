"""The two forwards that `enable` puts on a model's instance; nothing in transformers is replaced.

That of the base model returns, in training, hidden states whose backward is the reverse sweep: whoever owns head and
loss keeps them. That of the causal model, given labels, takes its head in pieces. Everything else (generation,
evaluation, saving) is the model as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from slimgrad import api
from slimgrad.errors import InputError, ModelError
from slimgrad.hf import mends
from slimgrad.hf.batch import read_batch
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.head import IGNORED, linear_loss, loss_in_pieces
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.step import BaseStep
from slimgrad.sweep.schedules.base import Schedule


def install(inner: nn.Module, certificate: Certificate, *, chunk: int, schedule: Schedule | None = None) -> BaseStep:
    """Replace the forwards, whatever the certificate says; the step that they run."""
    step = mends.step_for(inner, certificate, chunk=chunk)
    base = step.base
    on_base = BaseForward(base, step, certificate, schedule)
    if base is not inner and certificate.head is not None:
        inner.forward = CausalForward(inner, on_base, certificate)
        inner.__dict__["_replicate_for_data_parallel"] = _refuse_data_parallel
    base.forward = on_base
    base.__dict__["_replicate_for_data_parallel"] = _refuse_data_parallel
    return step


def _refuse_data_parallel(*args: Any) -> Any:
    raise ModelError(
        "torch.nn.DataParallel copies the model per device, and the copies would run on the original's weights. "
        "Expected DistributedDataParallel (torchrun), or CUDA_VISIBLE_DEVICES with one device"
    )


def uninstall(inner: nn.Module) -> bool:
    """Put back what was there; whether anything was replaced."""
    found = False
    for module in inner.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, BaseForward | CausalForward):
            if forward.previous is None:
                del module.forward
            else:
                module.forward = forward.previous
            found = True
        else:
            below = None if forward is None else enabled_below(forward)
            if below is not None:  # somebody has wrapped it since: it stays, and passes on
                below.active, found = False, True
        module.__dict__.pop("_replicate_for_data_parallel", None)
    return found


def enabled_below(forward: Any) -> BaseForward | CausalForward | None:
    """An active forward of ours, here or below what somebody (TRL, Accelerate) has wrapped around it."""
    seen, todo = set[int](), [forward]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, BaseForward | CausalForward):
            if one.active:
                return one
            todo.append(one.previous)
            continue
        function = getattr(one, "__func__", one)
        todo.append(getattr(function, "__wrapped__", None))
        todo += [
            cell.cell_contents for cell in getattr(function, "__closure__", None) or () if callable(cell.cell_contents)
        ]
    return None


@contextmanager
def evaluated_in_chunks(model: nn.Module) -> Generator[None]:
    """Within the block an enabled model is swept in eval mode and without gradients as well: a loss over any length
    without its logits, or activations of the whole length.
    """
    found = [enabled_below(module.__dict__.get("forward")) for module in model.modules()]
    forwards = [one for one in found if one is not None and not one.evaluates]
    try:
        for one in forwards:
            one.evaluates = True
        yield
    finally:
        for one in forwards:
            one.evaluates = False


class _Forward:
    """A forward on an instance: an object of a class, so that copies and pickles of the module carry their own.

    Attributes:
        module: whose forward it is.
        previous: what was on the instance before (Accelerate, TRL), or None for the class' own.
        active: False after `disable` where somebody wrapped it.
        evaluates: whether calls outside of training are swept as well.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.previous, self.active = module, module.__dict__.get("forward"), True
        self.evaluates = False

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was replaced."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return cast(Any, type(self.module)).forward(self.module, *args, **kwargs)

    def is_training(self) -> bool:
        """Whether this call is one to sweep."""
        return self.active and (self.evaluates or (self.module.training and torch.is_grad_enabled()))

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}


class BaseForward(_Forward):
    """The base model's: in training and without a cache, hidden states whose backward is the reverse sweep."""

    def __init__(self, base: nn.Module, step: BaseStep, certificate: Certificate, schedule: Schedule | None) -> None:
        super().__init__(base)
        self.step, self.certificate, self.schedule = step, certificate, schedule
        self.handed_out: Tensor | None = None  # hidden states that the head is asked for, instead of a pass
        self.sweeps = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.handed_out is not None:
            return self.step.output_type(last_hidden_state=self.handed_out)
        if not self.is_training():
            return self.original(*args, **kwargs)
        given, config, step = self.by_name(args, kwargs), self.step.config, self.step
        batch = read_batch(given, config, padding=self.certificate.counts_padding, takes_positions=step.takes_positions)
        states: list[Any] | None = None
        if depends_on_length(self.module):
            states = []
            for one in batch.sequences:
                rows, time = next(iter(one.values())).shape[:2]
                states.append({**step.initial_state(rows), "total": time})
        step.routes = bool(given.get("output_router_logits", getattr(config, "output_router_logits", False)))
        outputs = api.outputs(step, batch.sequences, chunk=step.chunk, schedule=self.schedule, state=states)
        self.sweeps += len(batch.sequences)
        hidden = batch.assembled([one["last_hidden_state"] for one in outputs])
        found = step.output_type(last_hidden_state=hidden)
        if step.routes:
            each = zip(*[one["router_logits"] for one in outputs], strict=True)
            found["router_logits"] = tuple(batch.assembled(list(parts)).flatten(0, 1) for parts in each)
        return found


@dataclass
class LossOutput(ModelOutput):
    """What a causal model's forward returns in training: the loss. Its logits were never all there at once.

    Attributes:
        loss: 0-d.
    """

    loss: Tensor | None = None

    @property
    def logits(self) -> Any:
        """Not there: says so."""
        raise InputError(
            "the logits of a forward with labels are not kept in training, where the head is taken in pieces. Expected "
            "them from a forward in eval mode, without labels, or after slimgrad.hf.disable(model)"
        )


class CausalForward(_Forward):
    """The causal model's: given labels in training, its head in pieces."""

    def __init__(self, inner: nn.Module, base: BaseForward, certificate: Certificate) -> None:
        super().__init__(inner)
        self.base, self.certificate = base, certificate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.by_name(args, kwargs)
        labels = given.pop("labels", None)
        if labels is None or not self.is_training() or not self._takes_pieces(given):
            return self.original(*args, **kwargs)
        count, shifted = given.pop("num_items_in_batch", None), given.pop("shift_labels", None)
        for name in ("logits_to_keep", "return_dict"):
            given.pop(name, None)
        hidden = self.base.module(**given).last_hidden_state
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.certificate.shifts_labels else labels
        shifted = shifted.to(hidden.device)
        total = self._summed(hidden, shifted)
        if count is None:
            count = (shifted != IGNORED).sum()
        elif isinstance(count, Tensor):
            count = count.to(total.device)
        return LossOutput(loss=total / count)

    def _takes_pieces(self, given: dict[str, Any]) -> bool:
        """Whether the loss is the cross-entropy that the certificate has seen; else the model computes its own."""
        routed = given.get("output_router_logits", getattr(self.base.step.config, "output_router_logits", False))
        named = getattr(self.module, "loss_function", ForCausalLMLoss)
        return (
            self.certificate.head != "whole" and not routed and named is ForCausalLMLoss and "ignore_index" not in given
        )

    def _summed(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = cast(Any, self.module).get_output_embeddings()
        if self.certificate.head == "linear" and _is_plain(head):
            return linear_loss(hidden.flatten(0, 1), targets.flatten(), head)
        below = {id(p) for p in self.base.module.parameters()}
        own = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set[int]()
        parameters = [p for p in self.module.parameters() if p.requires_grad and (id(p) not in below or id(p) in own)]
        if not torch.is_grad_enabled():
            parameters = []
        return loss_in_pieces(hidden, targets, self.logits_of, parameters)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The model's own head: its forward around a base that hands out `hidden` `[batch, time, width]`."""
        self.base.handed_out = hidden
        try:
            return self.original(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self.base.handed_out = None


def _is_plain(head: Any) -> bool:
    """Whether a head is a linear layer that nobody has put something around."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
