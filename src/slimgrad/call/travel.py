"""States and their gradients between processes, through `torch.distributed`.

A state's size does not depend on the length of the sequence (but for rows of `Growing`), so this is all that travels
where several processes share one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimgrad.states import raw_tensor
from slimgrad.states.base import State
from slimgrad.sweep import tree


@dataclass(frozen=True)
class _Emptied:
    """What goes ahead of a tensor: its shape, and its leaf without its numbers."""

    shape: torch.Size
    leaf: Tensor | State


def send_state(state: Any, to: int, group: dist.ProcessGroup | None = None) -> int:
    """Send a state, or the gradient of one, to the process of rank `to`, which calls `receive_state`.

    Args:
        state: a pytree of tensors, `PrefixSum`, `Growing`, plain values. Its tensors are on a device that the group's
            backend sends from.
        to: the other's rank.
        group: of processes; None is all of them.

    Returns:
        Bytes of the tensors sent.

    Raises:
        What `torch.distributed` raises: no process group, a process that is gone.

    Cost: blocks as `torch.distributed.send` does. Beside the tensors travel their shapes and the plain values, pickled.
    """
    tensors: list[Tensor] = []

    def emptied(leaf: Any) -> Any:
        x = raw_tensor(leaf)
        if x is None:
            return leaf
        nothing = x.detach().new_empty([0] * x.dim())
        tensors.append(x.detach().resolve_conj().resolve_neg().contiguous())
        return _Emptied(x.shape, leaf.with_value(nothing) if isinstance(leaf, State) else nothing)

    dist.send_object_list([tree.map_leaves(emptied, state)], dst=to, group=group)
    for x in tensors:
        if x.numel():
            dist.send(x.view(-1).view(torch.uint8), dst=to, group=group)
    return sum(x.nbytes for x in tensors)


def receive_state(source: int, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> Any:
    """What the process of rank `source` sends by `send_state`.

    Args:
        source: the other's rank. What it sends is unpickled: talk to processes that you trust.
        group: of processes; None is all of them.
        device: where the tensors are wanted; None is the CPU. NCCL receives on a GPU alone.

    Returns:
        The state, or the gradient of one: the same tree, its tensors without a graph.

    Raises:
        What `torch.distributed` raises: no process group, a process that is gone.

    Cost: waits until all has come.
    """
    received: list[Any] = [None]
    dist.recv_object_list(received, src=source, group=group)

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, _Emptied):
            return leaf
        nothing = raw_tensor(leaf.leaf)
        assert nothing is not None
        x = torch.empty(leaf.shape, dtype=nothing.dtype, device=device)
        if x.numel():
            dist.recv(x.view(-1).view(torch.uint8), src=source, group=group)
        return leaf.leaf.with_value(x) if isinstance(leaf.leaf, State) else x

    return tree.map_leaves(filled, received[0])
