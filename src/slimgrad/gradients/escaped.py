"""What belongs to a chunk that is over takes no gradient any more."""

from __future__ import annotations

from torch import Tensor

from slimgrad.errors import SweepError


def escaped() -> SweepError:
    """A backward pass came to what belongs to a chunk that is over."""
    return SweepError(
        "a backward pass reached into a chunk of a sweep from outside: through a tensor that a module kept while "
        "the chunk ran (a side loss, a regulariser, an activation), or from another thread. Its gradient would be "
        "lost. Return such a tensor among the outputs of forward and add it in loss_fn; run one thread at a time "
        "on a model"
    )


def refuse_escaped(gradient: Tensor | None) -> None:
    """A tensor hook for what belongs to a chunk that is over."""
    if gradient is not None:
        raise escaped()
