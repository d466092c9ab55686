"""HRM-Text: its first cycles run without gradients, and append keys and values there all the same.

Plain backpropagation gives those rows no gradient, and what reads them without gradients passes none back. So their
values are appended, cut off from what made them. Activation checkpointing could not be told apart from this (its
reentrant kind runs layers without gradients and again with them), so it is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import ModelError
from slimgrad.hf.cache import FunctionalCache
from slimgrad.hf.step import BaseStep


class CyclesStep(BaseStep):
    """The base with a cache that may be appended to without gradients."""

    def bound(self, state: Any) -> Any:
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            raise ModelError(
                f"{type(self.base).__name__} runs some of its cycles without gradients, which activation checkpointing "
                "hides. Expected none: model.gradient_checkpointing_disable(), gradient_checkpointing=False"
            )
        return CyclesCache(self.kinds(), state["layers"], state["position"])


class CyclesCache(FunctionalCache):
    """Appends values alone where gradients are off."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        with torch.enable_grad():
            return super().update(key_states.detach(), value_states.detach(), layer_idx, *args, **kwargs)
