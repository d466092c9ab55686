"""Every cast to a narrow float inside a model becomes one to float64, so that a comparison in float64 means something.

Many models cast to float32 inside (normalisation, rotary angles, state-space decays), where float64 gradients of two
right computations still differ by 1e-7. Nothing in the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class _Widened(TorchFunctionMode):
    """Replaces narrow dtypes among the arguments of torch's functions, and widens what comes out narrow even so: new
    tensors of the default dtype, which is the whole process' and stays as it is.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        wide = {name: torch.float64 if _is_narrow(x) else x for name, x in (kwargs or {}).items()}
        if func is torch.full and wide.get("dtype") is None and type(wide.get("fill_value", args[-1])) is float:
            wide["dtype"] = torch.float64  # of the default one, the least of all numbers is none
        found = func(*[torch.float64 if _is_narrow(x) else x for x in args], **wide)
        return found.double() if type(found) is torch.Tensor and found.dtype in _NARROW else found


def _is_narrow(x: Any) -> bool:
    return isinstance(x, torch.dtype) and x in _NARROW


@contextmanager
def widened() -> Generator[None]:
    """Within the block casts widen, and new tensors are float64, in this thread. A backward pass leaves the block: what
    runs a model within one enters it anew.
    """
    with _Widened():
        yield
