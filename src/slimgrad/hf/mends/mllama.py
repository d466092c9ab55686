"""Mllama: asks each layer of the cache, also those of plain attention, whether it holds an image's keys before it runs.

Rows are not known before they are appended, so the layers say that they hold none: of plain attention nothing follows
from the answer, and layers of attention to images are left out, as they are in a whole pass without images.
"""

from __future__ import annotations

from typing import Any

from slimgrad.hf.step import BaseStep


class MllamaStep(BaseStep):
    """The base with a cache that is not initialized."""

    def bound(self, state: Any) -> Any:
        cache = super().bound(state)
        for layer in cache.layers:
            layer.is_initialized = False
        return cache
