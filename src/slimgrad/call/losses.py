"""The default loss: next-token cross-entropy, and how targets are counted."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgrad.errors import InputError

IGNORED = -100
_COUNT_PIECE = 1 << 16


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats per token.

    Args:
        outputs: logits `[batch, time, classes]`; 16-bit logits are widened to float32 first.
        targets: `[batch, time]` integers; -100 is ignored.

    Returns:
        `[batch, time]`, zero where ignored.
    """
    given: list[object] = [outputs, targets]
    tensors = isinstance(given[0], Tensor) and isinstance(given[1], Tensor)
    if not tensors or outputs.dim() != 3 or targets.shape != outputs.shape[:2]:
        came = [str(list(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in given]
        raise InputError(
            f"the default loss expects logits [batch, time, classes] and integer targets [batch, time]; got "
            f"{' and '.join(came)}. Pass loss_fn= for anything else"
        )
    if targets.is_floating_point() or targets.is_complex():
        raise InputError(
            f"the default loss expects the numbers of classes as targets, got {targets.dtype}, of which it would take "
            "the whole part. Pass targets.long(), or loss_fn= for what is not a class"
        )
    logits = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)


def cross_entropy_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """`token_cross_entropy` summed over the chunk."""
    return token_cross_entropy(outputs, targets).sum()


def is_counted(targets: Tensor) -> Tensor:
    """Where integer targets are not ignored.

    Widened first, as the loss widens them: torch compares in the targets' own type, in which -100 is 156 (uint8) or
    65436 (uint16), a class like any other.
    """
    return targets.long() != IGNORED


def count_targets(targets: Any, batch: int, time: int) -> int:
    """How many targets are not ignored; for anything but integer targets, every position counts."""
    if isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex():
        return int(sum(is_counted(piece).sum() for piece in targets.split(_COUNT_PIECE, dim=1)))  # waits once
    return batch * time


def is_mean_over_time(loss: Tensor, batch: int, span: tuple[int, int]) -> bool:
    """Whether `loss` was made by a mean over the tokens of a chunk, as far as its graph tells.

    Looked for behind whatever was done to single numbers since (`mean / 4`, `mean + penalty`). A mean over the batch
    alone adds up over chunks, and so does the mean of a single token.
    """
    time = span[1] - span[0]
    nodes: list[Any] = [] if loss.grad_fn is None or time == 1 else [loss.grad_fn]
    for node in nodes:  # it grows
        name = type(node).__name__
        shape = _shape_of_mean(node, name)
        if shape[:2] == (batch, time) or shape[:1] == (batch * time,):
            return True
        if name.startswith("NllLoss2D") and shape[:1] == (batch,) and prod(shape[2:]) == time:  # [batch, classes, time]
            return True
        if name in _OF_NUMBERS and tuple(node._input_metadata[0].shape) == () and len(nodes) < _MOST_NODES:
            nodes += [following for following, _ in node.next_functions if following is not None]
    return False


_OF_NUMBERS = ("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "NegBackward0", "ToCopyBackward0")
_MOST_NODES = 64


def _shape_of_mean(node: Any, name: str) -> tuple[int, ...]:
    """The shape of what a node took the mean of; empty if it took none."""
    if getattr(node, "_saved_reduction", None) == 1:  # torch's own losses: 0 is none, 1 the mean, 2 the sum
        return tuple(node._saved_self.shape)
    return tuple(node._saved_self_sym_sizes) if name.startswith("MeanBackward") else ()
