"""The optimiser of a run by its name, and the learning rate over the run."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slimgrad.bytelm.config import Part, TrainConfig
from slimgrad.errors import InputError
from slimgrad.models.performer import Performer

_DROP_AFTER, _DROP_TO = 2 / 3, 0.1
_UNFIT = {"LBFGS": "it computes the loss again and again", "SparseAdam": "it is for sparse gradients"}


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The one that the configuration names, over the model's parameters; weight decay is for matrices only.

    Raises:
        InputError: there is none of that name, or its arguments or the parameters do not fit it.
    """
    kind, arguments = _named(config)
    return _make(config, kind, arguments, [p for p in model.parameters() if p.requires_grad])


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimiser that `make_optimizer` would refuse; no memory is taken for it."""
    kind, arguments = _named(config)
    with torch.device("meta"):
        parameters = list(Performer(config.model).parameters())
    _make(config, kind, {name: value for name, value in arguments.items() if name != "fused"}, parameters)


def moment_bytes(config: TrainConfig, model: nn.Module) -> int:
    """What the optimiser will hold, measured by one step over each parameter by itself."""
    kind, arguments = _named(config)
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            alone = torch.zeros_like(parameter).requires_grad_()
            alone.grad = torch.zeros_like(alone)
            optimizer = _make(config, kind, arguments, [alone])
            optimizer.step()
            held = pytree.tree_leaves(list(optimizer.state.values()))
            total += sum(one.nbytes for one in held if isinstance(one, Tensor))
    return total


def _named(config: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class, and the arguments that it is made with beside the learning rate; `weight_decay` is always there."""
    name, _, written = config.optimizer.partition(":")
    given = dict(_argument(config, one) for one in re.split(r",(?=\w+=)", written) if one)
    if "lr" in given:
        raise InputError(f"--optimizer {config.optimizer}: expected no lr, which is --learning-rate")
    kind = _class(config, name)
    defaults: dict[str, Any] = {"weight_decay": 0.0}
    if kind is torch.optim.AdamW:
        defaults = {"weight_decay": config.weight_decay, "betas": config.betas}
        if not {"foreach", "differentiable", "fused"} & {*given}:
            defaults["fused"] = True
    elif "weight_decay" not in inspect.signature(kind).parameters:
        defaults = {}
    return kind, defaults | given


def _argument(config: TrainConfig, words: str) -> tuple[str, Any]:
    name, equals, value = words.partition("=")
    if not equals:
        raise InputError(f"--optimizer {config.optimizer}: expected NAME, or NAME:ARGUMENT=VALUE,..., found {words!r}")
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        found = value
    return name, tuple(found) if isinstance(found, list) else found


def _class(config: TrainConfig, name: str) -> type[torch.optim.Optimizer]:
    known = {
        one: found
        for one, found in vars(torch.optim).items()
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
    }
    exact = {one.lower(): one for one in known}.get(name.lower())
    if exact in _UNFIT:
        raise InputError(f"--optimizer {config.optimizer}: {_UNFIT[exact]}. Name another one")
    if exact is None:
        fitting = ", ".join(one for one in known if one not in _UNFIT)
        raise InputError(f"--optimizer {config.optimizer}: expected one of {fitting}")
    return known[exact]


def _make(
    config: TrainConfig, kind: type[torch.optim.Optimizer], arguments: dict[str, Any], parameters: list[Any]
) -> torch.optim.Optimizer:
    matrices, vectors = ([p for p in parameters if (p.dim() >= 2) is large] for large in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors}]
    if "weight_decay" in arguments:
        groups[1]["weight_decay"] = 0.0
    made: Any = kind
    try:
        return made(groups, lr=config.learning_rate, **arguments)
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
        raise InputError(f"--optimizer {config.optimizer}: {' '.join(str(error).split())}") from error


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One rate for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate_at(part: Part, before: float, after: float) -> float:
    """A straight rise over the warm-up, then what `decay` says.

    Args:
        part: of the run.
        before, after: the fractions of the part's training bytes that were seen before a step, and are after it.
    """
    if after <= part.warmup:
        return part.learning_rate * after / part.warmup
    done = max(before - part.warmup, 0.0) / (1 - part.warmup)
    if part.decay == "cosine":
        return part.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if part.decay == "linear":
        return part.learning_rate * (1 - done)
    drops = part.decay == "drop" and before >= _DROP_AFTER
    return part.learning_rate * (_DROP_TO if drops else 1.0)
