"""The kinds of state a causal model may carry from chunk to chunk, one file each.

A state is a pytree (dicts, lists, tuples, named tuples) whose leaves are

| leaf | forward | how it goes back in time | file |
|---|---|---|---|
| `PrefixSum` | `S += delta` | `S -= delta`, bit for bit | `sums` |
| `Growing` | append rows along time | cut off the end | `rows` |
| a floating tensor | any function | from a kept copy, or recomputed from an earlier one | `tensors` |
| an integer or boolean tensor | any function | likewise; no gradient | `tensors` |
| a Python value | any function | kept | `values` |
| another `State` | its own | its own | yours: see `base` |
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimgrad.states.base import Carrier, Setting, State
from slimgrad.states.tensors import TensorCarrier
from slimgrad.states.values import ValueCarrier


def carrier_for(leaf: Any, setting: Setting) -> Carrier:
    """What carries one leaf of an initial state."""
    if isinstance(leaf, State):
        return leaf.carrier(setting)
    return TensorCarrier(setting, leaf) if isinstance(leaf, Tensor) else ValueCarrier(setting, leaf)


def raw_tensor(leaf: Any) -> Tensor | None:
    """The tensor behind a leaf of a state; None for a Python value."""
    if isinstance(leaf, State):
        return leaf.value
    return leaf if isinstance(leaf, Tensor) else None
