"""Forward passes with gradients on, whose graph keeps no tensor.

A first sweep wants states, not gradients. `torch.no_grad` would hold no graph, but some operations take other kernels
under it (of 29 tried in float32, `nn.LSTM` and the fast path of `nn.TransformerEncoderLayer` in evaluation mode gave
other bits), and the second sweep must meet the very bits that the first one saw. So gradients stay on, and what
operations save for their backward passes is dropped on the spot. What remains while an output lives are the graph's
nodes, without tensors, and whatever a custom `autograd.Function` puts on its `ctx` as an attribute.

Cost: a call of Python for each tensor that is not kept, so that loops of small operations take longer, and gain less:
their nodes remain. What it saves: `python -m benchmarks.first_sweep`.

A model that differentiates within its own step needs what is dropped: `wants_graph` knows the errors that this raises.
Nothing comes out wrong in silence: a backward pass finds all that it reads, or raises.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch

from slimgrad.gradients.escaped import escaped

_blocks = threading.local()


def keeps_no_graph() -> bool:
    """Whether this thread is within `graphless`, where activation checkpointing has nothing to save."""
    return getattr(_blocks, "depth", 0) > 0


class GraphWanted(Exception):  # noqa: N818
    """A backward pass asked for a tensor that was not kept."""


@contextmanager
def graphless() -> Generator[None]:
    """Within the block, operations run as in a pass that will be differentiated, and keep no tensor for it.

    The model's own saved-tensor hooks, where it uses some, act in place of these ones, as they do in any pass.

    A backward pass that comes after the block is refused by name: the chunk is over.

    Raises:
        RuntimeError: entered where saved-tensor hooks are not allowed: within `torch.func.grad` and its like.
    """
    over: list[bool] = []

    def refuse(nothing: None) -> torch.Tensor:
        if over:
            raise escaped()
        raise GraphWanted(
            "a backward pass within a model's step reads tensors that this pass, which needs no gradient, did not keep"
        )

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_drop, refuse):
        _blocks.depth = getattr(_blocks, "depth", 0) + 1
        try:
            yield
        finally:
            _blocks.depth -= 1
            over.append(True)
            # where torch.compile meets torch.func.grad for the first time, and is refused, it leaves hooks forbidden in
            # this thread for good, and torch.utils.checkpoint with them
            torch._C._autograd._saved_tensors_hooks_enable()  # pyright: ignore


def wants_graph(error: BaseException) -> bool:
    """Whether `error` comes from what `graphless` leaves out: the same without it may then succeed.

    Looks along the chain of causes, and at what was being handled. So do not try again before the `except` block has
    ended, or the second error will carry the first. torch.func has no exception of its own: its refusal is known by
    its words.
    """
    seen: set[int] = set()
    ahead: list[BaseException | None] = [error]
    while ahead:
        link = ahead.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        if isinstance(link, GraphWanted) or (isinstance(link, RuntimeError) and "saved tensor hooks" in str(link)):
            return True
        ahead += [link.__cause__, link.__context__]
    return False


def _drop(tensor: torch.Tensor) -> None:
    return None
