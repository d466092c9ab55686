"""The bytes of tensors that are alive, counted storage by storage: exact, the same each time, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimgrad.sweep.compiled import not_traced


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made within it and still alive, and their peak.

    What existed before does not count, and neither do the workspaces of kernels, which are no tensors. Slow: a Python
    call for each operation.

    Args:
        thresholds: bytes of a storage below which it is a small one: for each, these are counted once more.

    Attributes:
        made_large: bytes of all storages made that are not small by the first threshold, whether alive or not.
    """

    def __init__(self, thresholds: Sequence[int] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.made_large = 0
        self.small, self.peak_small = [0] * len(thresholds), [0] * len(thresholds)
        self._thresholds = tuple(thresholds)
        self._seen: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else Dynamo is loaded for it, which takes a second and 40 MB for good

    def reset_peak(self) -> None:
        """The peak begins anew from what is alive now."""
        self.peak, self.peak_small = self.live, list(self.small)

    @not_traced
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), ours=False)  # what existed before is not ours: parameters, tokens
        result = func(*args, **(kwargs or {}))
        self._note(result, ours=True)
        self.peak, self.peak_small = max(self.peak, self.live), [*map(max, self.peak_small, self.small)]
        return result

    def _note(self, tensors: Any, *, ours: bool) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and x.layout is torch.strided:
                storage = x.untyped_storage()
                key, nbytes = storage._cdata, storage.nbytes() if ours else 0  # pyright: ignore[reportPrivateUsage]
                if key not in self._seen:
                    self._seen.add(key)
                    self._add(nbytes)
                    if self._thresholds and nbytes >= self._thresholds[0]:
                        self.made_large += nbytes
                    weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self._add(-nbytes)

    def _add(self, nbytes: int) -> None:
        self.live += nbytes
        for k, threshold in enumerate(self._thresholds):
            self.small[k] += nbytes if abs(nbytes) < threshold else 0
