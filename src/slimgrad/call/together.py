"""Documents of a list that go through together: those of nearby lengths side by side, padded on the right.

A causal model makes nothing of what follows a document, and the padding has no targets, so loss and gradient are those
of each document alone, up to rounding, with one chunk in the place of many. That holds where rows of a batch do not
look at one another and nothing is drawn at random, so one short document is evaluated alone and beside another one
first, and where its loss differs, every document goes alone. Cost: two forward passes of short documents; what is
padded is at most a fifth. A batch has no more tokens, padding included, than a chunk.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.budget.probe import as_it_was
from slimgrad.call.arguments import Call, NotKept, Options, Result
from slimgrad.call.losses import IGNORED, cross_entropy_sum
from slimgrad.call.model import device_of
from slimgrad.call.protocol import require_causal_model

logger = logging.getLogger("slimgrad")
_NEARBY = 0.8  # of the longest of a batch
# How close, relatively, a document's losses are alone and beside another one. Measured on a CPU over nine models: at
# most 3e-16, 1.6e-7, and in 16 bits 2e-7; dropout of one logit in a hundred moves them by 4e-5 at least. What is
# farther apart goes alone, which is slower and right.
_CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6}
_CLOSE_IN_16_BITS = 1e-5


class Joined(NamedTuple):
    """What goes through a model.

    Attributes:
        inputs, targets: batches in place of a list of documents, or as they were given.
        documents: how many were put into batches; 0: none.
    """

    inputs: Any
    targets: Any
    documents: int = 0

    def result(self, found: Result) -> Result:
        """Without the states after each document, which nobody has where they are in batches."""
        if not self.documents:
            return found
        if found.initial_state_grad is None:  # of an evaluation
            return dataclasses.replace(found, final_state=NotKept)
        return dataclasses.replace(
            found, final_state=NotKept, initial_state_grad=NotKept, input_grads=[None] * self.documents
        )


def join(model: nn.Module, inputs: Any, targets: Any, options: Options, *, apart: bool = False) -> Joined:
    """The documents of a list side by side, or what was given, where they go alone.

    They go alone where that is asked for (`apart`), and where anything could tell: where a state, a context, a loss of
    the caller's own or `on_chunk` was given, where a budget was given or taken, where an input is no tensor of tokens,
    or where rows of a batch are not independent.
    """
    found = None if apart else _batches(model, inputs, targets, options)
    return Joined(inputs, targets) if found is None else found


def _batches(model: nn.Module, inputs: Any, targets: Any, options: Options) -> Joined | None:
    require_causal_model(model)
    asked = (options.state, options.context, options.on_chunk, options.plan)
    if not isinstance(inputs, list) or options.loss_fn is not cross_entropy_sum or any(x is not None for x in asked):
        return None
    if type(options.chunk) is not int:  # which is refused by name elsewhere
        return None
    given = cast("list[Any]", inputs)
    goals = [None] * len(given) if targets is None else targets
    if not isinstance(goals, list) or len(cast("list[Any]", goals)) != len(given):
        return None
    rows: list[_Row] = []
    for document, goal in zip(given, cast("list[Any]", goals), strict=True):
        tokens, aims = _row_of(document), None if goal is None else _row_of(goal)
        if tokens is None or not len(tokens) or (goal is not None and (aims is None or len(aims) != len(tokens))):
            return None
        rows.append(_Row(tokens, aims))
    if len({(x.tokens.dtype, x.tokens.device) for x in rows}) != 1:
        return None
    groups = _groups([len(x.tokens) for x in rows], options.chunk)
    if all(len(group) == 1 for group in groups):
        return None
    if not _are_independent(model, rows, groups, options):
        logger.info("documents go alone: rows of a batch are not independent, or something is drawn at random")
        return None
    inputs, aims = [], []
    for group in groups:
        alone = len(group) == 1  # as it was given, and not copied
        tokens, goal = (given[group[0]], goals[group[0]]) if alone else _padded([rows[i] for i in group])
        inputs.append(tokens)
        aims.append(goal)
    return Joined(inputs, aims, len(rows))


class _Row(NamedTuple):
    """A document `[time]` and its targets; None: the next token."""

    tokens: Tensor
    targets: Tensor | None

    def aims(self) -> Tensor:
        """The targets, int64."""
        if self.targets is not None:
            return self.targets.long()
        return F.pad(self.tokens[1:].long(), (0, 1), value=IGNORED)


def _row_of(given: Any) -> Tensor | None:
    """One sequence's integers `[time]`; None for anything else."""
    if type(given) is not Tensor or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        return None
    if given.dim() == 2 and given.shape[0] == 1:
        return given[0]
    return given if given.dim() == 1 else None


def _groups(lengths: Sequence[int], chunk: int) -> list[list[int]]:
    """Documents by number: those side by side whose lengths are near enough, and which fit into a chunk."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = lengths[groups[-1][0]] if groups else 0
        near = lengths[number] >= _NEARBY * longest
        if groups and near and (len(groups[-1]) + 1) * longest <= chunk:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _padded(rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    """Documents and targets `[batch, time]`; padded by a document's own first token, which no target asks about."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.stack([torch.cat([x.tokens, x.tokens[:1].expand(longest - len(x.tokens))]) for x in rows])
    aims = [F.pad(row.aims(), (0, longest - len(row.tokens)), value=IGNORED).to(tokens.device) for row in rows]
    return tokens, torch.stack(aims)


def _are_independent(model: nn.Module, rows: Sequence[_Row], groups: Sequence[Sequence[int]], options: Options) -> bool:
    """Whether a document's loss is the same alone and beside another one: the shortest one that has a target."""
    for module in model.modules():
        draws = isinstance(module, nn.modules.dropout._DropoutNd) and module.p  # pyright: ignore[reportPrivateUsage]
        draws = draws or (isinstance(module, nn.RNNBase) and module.dropout)
        mixes = isinstance(module, nn.modules.batchnorm._NormBase)  # pyright: ignore[reportPrivateUsage]
        if module.training and (draws or mixes):
            return False
    several = [(number, group) for group in reversed(groups) if len(group) > 1 for number in group]
    number, group = next((one for one in several if (rows[one[0]].aims() != IGNORED).any()), (None, ()))
    if number is None:
        return False
    tokens, aims = _padded([rows[number]])
    other = rows[next(one for one in group if one != number)].tokens
    pair = [_Row(other, torch.full_like(other, IGNORED, dtype=torch.int64)), rows[number]]
    with as_it_was(model):
        alone = _loss(model, tokens, aims, options)
        try:
            beside = _loss(model, *_padded(pair), options)
        except Exception as error:  # noqa: BLE001 - of a model that takes one row alone
            logger.info("documents go alone: beside one another they do not go through the model (%s)", error)
            return False
    device = device_of(model)
    exact = all(p.dtype in _CLOSE for p in model.parameters()) and not torch.is_autocast_enabled(device.type)
    close = _CLOSE[alone.dtype] if exact and alone.dtype in _CLOSE else _CLOSE_IN_16_BITS
    return bool((alone - beside).abs() <= close * alone.abs())


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, options: Options) -> Tensor:
    call = Call(model, inputs, targets, options._replace(normalizer=1.0, schedule=None))
    call.start(0, differentiates=False).run.forward(head=True)
    return call.total_loss()
