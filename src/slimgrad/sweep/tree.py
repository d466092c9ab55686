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
dumps = pytree.treespec_dumps
loads = pytree.treespec_loads


_LEAF = object()


def skeleton(spec: TreeSpec) -> Tree:
    """A tree of structure `spec` with nothing in it: what `flatten_like` compares with.

    Its leaves are not None, which a registered dataclass leaves out when it is flattened.
    """
    return pytree.tree_unflatten([_LEAF] * spec.num_leaves, spec)


def flatten_like(tree: Tree, like: Tree) -> list[Any]:
    """The leaves of a tree that has the structure of the skeleton `like`; `ValueError` that says where it has not.

    torch's own functions define a recursive function at each call, a cycle that only the garbage collector frees. In a
    sweep they pile up chunk by chunk (2 kB each, measured as growing resident memory), hence this one.
    """
    found: list[Any] = []
    _collect(tree, like, found)
    return found


def _collect(tree: Tree, like: Tree, found: list[Any]) -> None:
    if pytree.tree_is_leaf(like):
        found.append(tree)
    elif type(tree) is not type(like):
        raise ValueError(f"expected a {type(like).__name__}, got a {type(tree).__name__}")
    elif isinstance(like, dict):
        if tree.keys() != like.keys():
            raise ValueError(f"expected the keys {list(like)}, got {list(tree)}")
        for key, part in like.items():
            _collect(tree[key], part, found)
    elif isinstance(like, list | tuple):
        if len(tree) != len(like):
            raise ValueError(f"expected {len(like)} entries in a {type(like).__name__}, got {len(tree)}")
        for part, part_like in zip(tree, like, strict=True):
            _collect(part, part_like, found)
    else:  # a container that its owner registered
        parts, spec = pytree.tree_flatten(tree)
        expected = pytree.tree_flatten(like)[1]
        if spec != expected:
            raise ValueError(f"expected {expected}, got {spec} (a field that is None at first: begin with zeros)")
        found += parts


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


def paths(tree: Tree, *, alone: str = "(the state itself)") -> list[str]:
    """A readable name for each leaf, in order, as one would index it: `['layers'][0]`; `alone` where there is one."""
    try:
        named, _ = pytree.tree_flatten_with_path(tree)
    except ValueError:  # a container that was registered without names for its entries
        return [f"leaf {number}" for number in range(len(leaves(tree)))]
    return [pytree.keystr(path) or alone for path, _ in named]
