"""Random draws, made the same: what a model in training mode computes when nothing in it is left to chance."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SHARE = 0.75  # of the way from the least to the most, so that what is symmetric does not vanish


class ConstantDraws(TorchDispatchMode):
    """Within it dropout keeps everything, and every number that is drawn is the same one.

    Attributes:
        seen: how often something was drawn, by operation and number of elements.
        others: whether there were draws of another kind, which stay random.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()
        self.others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own_generator = kwargs.get("generator") is not None  # as the seeds of chunks
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()) or own_generator:
            return func(*args, **kwargs)
        name = cast(str, func.overloadpacket.__name__)
        if name.startswith("_scaled_dot_product") and not _dropout_of(func, args, kwargs):
            return func(*args, **kwargs)
        if name == "native_dropout":
            x = cast(Tensor, args[0])
            self.seen[name, x.numel()] += 1
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        found = func(*args, **kwargs)
        constant = _constant(name, args, kwargs)
        if constant is None or not isinstance(found, Tensor):
            self.others = True
            return found
        if found.numel():
            self.seen[name, found.numel()] += 1
        return found.copy_(constant) if isinstance(constant, Tensor) else found.fill_(constant)


def _dropout_of(func: Any, args: Any, kwargs: Any) -> float:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0)


def _constant(name: str, args: Any, kwargs: Any) -> Tensor | float | None:
    """What stands in the place of a draw; None: an operation that is not known."""
    if name in ("bernoulli", "bernoulli_"):  # the mean; of dropout's mask that keeps what there is
        given = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        return args[0] if name == "bernoulli" else given
    if name in ("rand", "rand_like"):
        return _SHARE
    if name in ("randn", "randn_like"):
        return 1.0
    if name == "uniform_":
        least = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
        most = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
        return least + _SHARE * (most - least)
    if name == "normal_":
        return (args[1] if len(args) > 1 else kwargs.get("mean", 0.0)) + (args[2] if len(args) > 2 else 1.0)
    return None
