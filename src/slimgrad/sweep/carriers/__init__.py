"""The sweep's side of the state: one carrier per leaf, for the length of one run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimgrad.sweep.carriers.base import Carrier, Mode, Root, mismatch
from slimgrad.sweep.carriers.growing import GrowingCarrier
from slimgrad.sweep.carriers.plain import TensorCarrier, ValueCarrier
from slimgrad.sweep.carriers.sums import SumCarrier
from slimgrad.sweep.state import Growing, PrefixSum

__all__ = ["Carrier", "GrowingCarrier", "Mode", "Root", "SumCarrier", "TensorCarrier", "carrier_for", "mismatch"]


def carrier_for(leaf: Any, index: int, name: str, *, rolls_back: bool, expected_growth: float) -> Carrier[Any]:
    """The carrier for one leaf of an initial state."""
    if isinstance(leaf, PrefixSum):
        return SumCarrier(index, name, leaf, logs=rolls_back)
    if isinstance(leaf, Growing):
        return GrowingCarrier(index, name, leaf, expected_growth=expected_growth)
    if isinstance(leaf, Tensor):
        return TensorCarrier(index, name, leaf)
    return ValueCarrier(index, name, leaf)
