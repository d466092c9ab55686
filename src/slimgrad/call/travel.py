"""States and their gradients between processes, through `torch.distributed`.

A state's size does not depend on the length of the sequence (but for rows of `Growing`), so this is all that travels
where several processes share one sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slimgrad.states.base import State
from slimgrad.sweep import tree


def send_state(state: Any, to: int, group: dist.ProcessGroup | None = None) -> int:
    """Send a state, or the gradient of one, to the process of rank `to`, which calls `receive_state`.

    Args:
        state: a pytree of tensors, `PrefixSum`, `Growing`, plain values.
        to: the other's rank.
        group: of processes; None is all of them.

    Returns:
        Bytes of the tensors sent.
    """
    leaves, spec = tree.flatten(state)
    raw = [leaf.value if isinstance(leaf, State) else leaf for leaf in leaves]
    form = [
        (type(leaf) if isinstance(leaf, State) else None, (x.shape, x.dtype) if isinstance(x, Tensor) else x)
        for leaf, x in zip(leaves, raw, strict=True)
    ]
    dist.send_object_list([tree.dumps(spec), form], dst=to, group=group)
    tensors = [x.detach().resolve_conj().resolve_neg().contiguous() for x in raw if isinstance(x, Tensor) and x.numel()]
    for x in tensors:
        dist.send(x.view(-1).view(torch.uint8), dst=to, group=group)
    return sum(x.nbytes for x in tensors)


def receive_state(source: int, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> Any:
    """What the process of rank `source` sends by `send_state`.

    Args:
        source: the other's rank. What it sends is unpickled: talk to processes that you trust.
        group: of processes; None is all of them.
        device: where the tensors are wanted; None is the CPU.
    """
    received: list[Any] = [None, None]
    dist.recv_object_list(received, src=source, group=group)
    leaves: list[Any] = []
    for kind, form in received[1]:
        if not (isinstance(form, tuple) and len(form) == 2 and isinstance(form[0], torch.Size)):
            leaves.append(form)
            continue
        x = torch.empty(form[0], dtype=form[1], device=device)
        if x.numel():
            dist.recv(x.view(-1).view(torch.uint8), src=source, group=group)
        leaves.append(x if kind is None else kind(x))
    return tree.unflatten(leaves, tree.loads(received[0]))
