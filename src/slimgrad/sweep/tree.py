"""Pytrees: flattening a state, an input or a set of targets into leaves, and back.

The one place that touches torch's pytree module, which is stable in practice and private in name. `PrefixSum` and
`Growing` are leaves; a state's dataclasses may be registered with `torch.utils._pytree` by their owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
TreeSpec = pytree.TreeSpec
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten
leaves = pytree.tree_leaves


def flatten_like(tree: Tree, spec: TreeSpec) -> list[Any]:
    """The leaves of a tree that has the structure `spec`; `ValueError` if it has not.

    Unlike `flatten` it leaves no garbage cycles behind, which the sweep would pile up chunk by chunk.
    """
    return spec.flatten_up_to(tree)


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """The same tree with `function` applied to every leaf."""
    return pytree.tree_map(function, tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The same tree with `function` applied to its tensors; other leaves stay."""

    def apply(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(apply, tree)


def tensors(tree: Tree) -> list[Tensor]:
    """The tensors among the leaves, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def paths(tree: Tree) -> list[str]:
    """A readable name for each leaf, in order, as one would index it: `['layers'][0]`."""
    named, _ = pytree.tree_flatten_with_path(tree)
    return [pytree.keystr(path) or "(the state itself)" for path, _ in named]
