"""What was put on a model since it was built, and might look across tokens: hooks, modules, forwards.

Adapters, trainers and users do that at any time, also after `enable`. Whatever is new is a reason to look again.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from slimgrad.errors import ModelError

_Hooks = dict[int, Any]


def made_of(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """The modules, and what decides how each runs beside its weights: its forward, one on the instance, its hooks."""
    found: list[Any] = []
    for module in modules:
        found += [module, type(module).forward, module.__dict__.get("forward")]
        found += [hook for hooks in _forward_hooks(module) for hook in hooks.values()]
    return {id(x): x for x in found}


def _forward_hooks(module: nn.Module) -> tuple[_Hooks, _Hooks]:
    return module._forward_hooks, module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage, reportReturnType]


@contextmanager
def nothing_captured(model: nn.Module, lengths: set[int]) -> Generator[None]:
    """What hooks of others keep of a pass within the block is of no use after it: NaN, and a gradient into it raises.
    It would pass for an output of the user's own tokens.

    Args:
        model: whose hooks.
        lengths: of what is passed, one row at a time. Other tensors, and those that modules hold, are left alone.
    """
    seen: dict[int, Tensor] = {}
    held = [
        *model.parameters(),
        *model.buffers(),
        *(x for m in model.modules() for x in _tensors(list(vars(m).values()))),
    ]
    lasting = {x.untyped_storage().data_ptr() for x in held}

    def note(module: nn.Module, *given: Any) -> None:
        found = [x for x in _tensors(given) if x.is_floating_point() and x.dim() > 1 and len(x) == 1]
        found = [x for x in found if lengths & {*x.shape[1:]} and x.untyped_storage().data_ptr() not in lasting]
        seen.update((id(x), x) for x in found)

    hooked = [module for module in model.modules() if any(_forward_hooks(module))]
    # first and last: one hook may replace what another has kept
    handles = [m.register_forward_hook(note, with_kwargs=True, prepend=p) for m in hooked for p in (True, False)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for x in seen.values():
            x.detach().fill_(float("nan"))
            if not x.requires_grad:
                x.requires_grad_().register_hook(_refuse)


def _refuse(gradient: Tensor) -> None:
    raise ModelError(
        "a hook kept an output of slimgrad's own look at the model, over random tokens, and a loss was computed from "
        "it. Expected hooks to be on the model when slimgrad.hf.enable is called, and activations from them to be used "
        "within a chunk only: what a loss outside needs, it takes from the model's outputs"
    )


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    parts = list(given.values()) if isinstance(given, dict) else given if isinstance(given, tuple | list) else []
    return [x for part in parts for x in _tensors(part)]
