"""Data parallelism the right way round, and the wrong ways refused."""

from __future__ import annotations

import gc

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slimgrad.errors import ModelError


def refuse_unsynchronised(model: nn.Module) -> None:
    """Raise if `model` lives inside a DistributedDataParallel that this call would bypass.

    A loss computed on `ddp.module` reaches the parameters without a forward pass of the wrapper, which then
    synchronises nothing and says nothing. Cost: a look through live objects, in distributed programs only.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for wrapper in gc.get_objects():
        # by type: isinstance would ask weak references that are dead, and lazy objects that then import something
        if issubclass(type(wrapper), DistributedDataParallel) and any(inner is model for inner in wrapper.modules()):
            raise ModelError(
                "this model lives inside a DistributedDataParallel; a gradient computed on it directly would not be "
                "synchronised between processes. Wrap the other way round and call that: "
                "ddp = DistributedDataParallel(slimgrad.Chunked(model, ...)); ddp(inputs, targets).backward()"
            )
