"""Several processes, several threads: the right way round, and the wrong ways refused."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slimgrad.errors import ModelError, SweepError
from slimgrad.sweep.program import is_inside_chunk

_sweeping: dict[int, int] = {}  # the modules that a sweep is under way on, by id, and its thread
_marking = threading.Lock()


@contextmanager
def one_thread_at_a_time(model: nn.Module) -> Generator[None]:
    """Within the block, a sweep of another thread on `model`, or on any part of it, is refused.

    While a chunk runs the modules hold stand-ins for their parameters, and gradients are added without a lock.
    """
    thread, modules = threading.get_ident(), [id(m) for m in model.modules()]
    with _marking:
        if any(_sweeping.get(m, thread) != thread for m in modules):
            raise SweepError(
                f"a sweep is under way in another thread on this {type(model).__name__}, or on a part of it; expected "
                "one at a time. Wait for it, or give each thread a copy of the model"
            )
        mine = [m for m in modules if m not in _sweeping]
        _sweeping.update(dict.fromkeys(mine, thread))

    def refuse_others(module: nn.Module, args: object) -> None:
        if threading.get_ident() != thread and not is_inside_chunk():  # slimgrad.evaluate waits for a chunk's end
            raise SweepError(
                f"{type(module).__name__} was called in another thread while a sweep is under way on it, when its "
                "parameters may be stand-ins; expected one thread at a time. Wait for it, or call a copy of the model"
            )

    # a compiled `call` would be compiled again for a hook
    compiled = model._compiled_call_impl is not None  # pyright: ignore[reportPrivateUsage]
    hook = None if compiled else model.register_forward_pre_hook(refuse_others)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        with _marking:
            for m in mine:
                del _sweeping[m]


def refuse_unsynchronised(model: nn.Module, *, through_autograd: bool = False) -> None:
    """Raise if `model` lives inside a DistributedDataParallel that this call would bypass.

    A loss computed on `ddp.module` reaches the parameters without a forward pass of the wrapper, which then
    synchronises nothing and says nothing. Within the wrapper's own forward, where a module that it wraps calls this,
    all is as it should be if the gradients come `through_autograd`, when the wrapper waits for them; what adds to
    `.grad` at once comes before that. Cost: a look through live objects, in distributed programs only.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if through_autograd and not torch.is_grad_enabled():
        return
    inside = DistributedDataParallel._active_ddp_module  # pyright: ignore  # set while the wrapper's forward runs
    for wrapper in gc.get_objects():
        # by type: isinstance would ask weak references that are dead, and lazy objects that then import something
        if not issubclass(type(wrapper), DistributedDataParallel) or (wrapper is inside and through_autograd):
            continue
        if not any(inner is model for inner in wrapper.modules()):
            continue
        if wrapper is inside:
            raise ModelError(
                "slimgrad.backward (or a Segment) was called within the forward of a DistributedDataParallel; it would "
                "add to .grad before the wrapper is ready to synchronise. Call slimgrad.loss, token_loss or outputs "
                "there, and return the loss"
            )
        raise ModelError(
            "this model lives inside a DistributedDataParallel; a gradient computed on it directly would not be "
            "synchronised between processes. Wrap the other way round and call that: "
            "ddp = DistributedDataParallel(slimgrad.Chunked(model, ...)); ddp(inputs, targets).backward(). A loss of "
            "your own belongs into the forward of a module that calls slimgrad.outputs and is wrapped whole"
        )
