"""The default loss: next-token cross-entropy, and how targets are counted."""

from __future__ import annotations

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
    if outputs.dim() != 3 or targets.shape != outputs.shape[:2]:
        raise InputError(
            f"the default loss expects logits [batch, time, classes] and integer targets [batch, time]; got "
            f"{list(outputs.shape)} and {list(targets.shape)}. Pass loss_fn= for anything else"
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
    """Whether `loss` was made by one mean over the tokens of a chunk, as far as its graph tells.

    A mean over the batch alone adds up over chunks, and so does the mean of a single token.
    """
    made_by: Any = loss.grad_fn
    time = span[1] - span[0]
    if made_by is None or time == 1:
        return False
    if getattr(made_by, "_saved_reduction", None) == 1:  # torch's own losses: 0 is none, 1 the mean, 2 the sum
        shape = tuple(made_by._saved_self.shape)
    elif type(made_by).__name__.startswith("MeanBackward"):
        shape = tuple(made_by._saved_self_sym_sizes)
    else:
        return False
    return shape[:2] == (batch, time) or shape[:1] == (batch * time,)
