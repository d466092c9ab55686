"""Models that run as CUDA graphs are refused: their outputs would be overwritten while a sweep still holds them.

A CUDA graph writes its outputs, and its backward pass the gradients, to the same memory at each replay. A sweep keeps
the state of one chunk while the next one runs, and gathers gradients over all of them: measured, a gradient that is off
by a factor of 1,000, with no word of it.

Recognised are what torch.compile was told (mode, options, backend, torch's own configuration) and what
torch.cuda.make_graphed_callables gave back: modules, their methods, and functions (and graphs) that a module or its
class holds as an attribute. A compiled function that `forward` finds elsewhere (a global, a closure) is not seen.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from slimgrad.errors import ModelError

_OPTION = "triton.cudagraphs"  # of torch's own compiler; modes "reduce-overhead" and "max-autotune" turn it on
_OWN = frozenset(vars(nn.Module()))  # torch's own entries of a module
_NEXT = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")  # from one wrapper of a backend to what it wraps


def refuse_cuda_graphs(model: nn.Module, loss_fn: Any = None) -> None:
    """Raise if a part of `model`, or `loss_fn`, is made to run as CUDA graphs and the model is on CUDA."""
    if not any(x.device.type == "cuda" for x in (*model.parameters(), *model.buffers())):
        return
    name = next(cuda_graphed(model), "loss_fn" if _is_cuda_graphed(loss_fn) else None)
    if name is not None:
        raise ModelError(
            f"{name} runs as CUDA graphs, whose outputs the next chunk overwrites in place: the gradient would be "
            "wrong. Compile it without mode= (or with mode='max-autotune-no-cudagraphs'), without "
            f"options={{'{_OPTION}': True}}, and leave torch.cuda.make_graphed_callables out"
        )


def cuda_graphed(model: nn.Module) -> Iterator[str]:
    """The names of the parts of `model` that are made to run as CUDA graphs."""
    kinds: dict[type, None] = {}
    for path, module in model.named_modules():
        kinds.update(dict.fromkeys(type(module).__mro__))
        shown = path or type(module).__name__
        if _is_cuda_graphed(module) or _is_cuda_graphed(module._compiled_call_impl):  # pyright: ignore[reportPrivateUsage]
            yield shown
        for name, value in vars(module).items():
            if name not in _OWN and _is_cuda_graphed(value):
                yield f"{shown}.{name}"
    for kind in kinds:
        for name, value in vars(kind).items():
            if name != "__module__" and _is_cuda_graphed(value):
                yield f"{kind.__name__}.{name}"


def _is_cuda_graphed(called: Any) -> bool:
    """Whether this module or function is compiled to CUDA graphs, or replays one."""
    if isinstance(called, type):
        return False
    if getattr(called, "__module__", None) == "torch.cuda.graphs":
        return True
    told = getattr(called, "get_compiler_config", None)
    if told is None:
        return False
    options = told()
    if options is not None:
        inductor = sys.modules.get("torch._inductor.config")
        return bool(options.get(_OPTION)) or (inductor is not None and bool(inductor.triton.cudagraphs))
    return any("cudagraph" in name for name in _backends(called))


def _backends(compiled: Any) -> Iterator[str]:
    """What the backend of torch.compile is called, by all the wrappers around it."""
    context = getattr(compiled, "dynamo_ctx", None)  # of a module; a function has it in its closure
    if context is None and not inspect.isroutine(compiled):
        return
    link: Any = inspect.getclosurevars(compiled).nonlocals.get("callback") if context is None else context.callback
    while link is not None:
        for holder in (link, getattr(link, "compiler_fn", None)):
            yield str(getattr(holder, "compiler_name", ""))
            yield str(getattr(holder, "__module__", ""))
        link = next((x for x in (getattr(link, name, None) for name in _NEXT) if x is not None), None)
