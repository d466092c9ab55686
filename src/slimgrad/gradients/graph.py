"""A chunk's graph, searched before it is gone through: for gradients that would be lost or would be wrong.

Every node is visited once. Python's garbage collector is held off meanwhile, since thousands of short-lived objects
would start it again and again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

_ORDINARY, _LEAF, _COUNTED = range(3)
_kinds: dict[type, int] = {}


def node_of(root: Tensor | GradientEdge) -> Any:
    """The node of autograd's graph that a root hangs on; None for a tensor without one."""
    return root.node if isinstance(root, GradientEdge) else root.grad_fn


def is_leaf(node: Any) -> bool:
    """Whether gradients end here, in a leaf's `.grad`."""
    return type(node).__name__ == "AccumulateGrad"


def find_strangers(roots: Iterable[Tensor | GradientEdge], known: Sequence[GradientEdge]) -> tuple[list[Tensor], bool]:
    """What the graph below `roots` ends in beside `known`, and whether an embedding scales by its tokens' counts.

    Returns:
        The leaves that require a gradient and are not known, and whether a lookup has `scale_grad_by_freq`.
    """
    leaves: list[Tensor] = []
    counted = False
    seen: set[Any] = {edge.node for edge in known}
    pending: list[Any] = []
    for root in roots:
        node = node_of(root)
        if node is not None and node not in seen:
            seen.add(node)
            pending.append(node)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while pending:
            node = pending.pop()
            kind = _kinds.get(type(node))
            if kind is None:
                kind = _kinds[type(node)] = _kind_of(type(node))
            if kind == _LEAF:
                leaves.append(node.variable)
                continue
            counted = counted or (kind == _COUNTED and node._saved_scale_grad_by_freq)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    pending.append(following)
    finally:
        if was_enabled:
            gc.enable()
    return leaves, counted


def _kind_of(node_type: type) -> int:
    if node_type.__name__ == "AccumulateGrad":
        return _LEAF
    return _COUNTED if hasattr(node_type, "_saved_scale_grad_by_freq") else _ORDINARY
