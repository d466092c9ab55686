"""What a saved gradient belongs to: compared when it is loaded."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import slimgrad
from slimgrad.call.arguments import Call
from slimgrad.call.program import LossFn
from slimgrad.states.checksum import checksum
from slimgrad.sweep import tree
from slimgrad.sweep.witness import fetch


def identity_of(call: Call, loss_fn: LossFn) -> dict[str, Any]:
    """Classes of modules; weights, buffers, context by shape, dtype and checksum; sequence by its shape; loss function
    and software.
    """
    model, one = call.model, call.sequences[0]
    tensors = {
        **{f"parameter {name}": p for name, p in model.named_parameters()},
        **{f"buffer {name}": b for name, b in model.named_buffers()},
        **{f"context {name}": x for name, x in _named(call.context) if isinstance(x, Tensor)},
    }
    bits = fetch([checksum(getattr(x.detach(), "_local_tensor", x.detach())) for x in tensors.values()])
    found = {
        name: f"{x.dtype} {list(x.shape)}{' trainable' if x.requires_grad else ''}, bits {number:x}"
        for (name, x), number in zip(tensors.items(), bits, strict=True)
    }
    classes = {f"module {path or '(the model)'}": type(module).__qualname__ for path, module in model.named_modules()}
    others = {f"context {name}": repr(x) for name, x in _named(call.context) if not isinstance(x, Tensor)}
    modes = "".join("t" if module.training else "e" for module in model.modules())
    return (
        found
        | classes
        | others
        | {
            "training modes": modes,
            "sequence": f"batch {one.batch}, {one.time} tokens",
            "inputs that take gradients": str([i for i, g in enumerate(one.collected.input_grads) if g is not None]),
            "sinks": ", ".join([] if call.gather is None else call.gather.sinks) or "none",
            "loss function": loss_name(loss_fn),
            "device": one.device.type,
            **environment(one.device),
        }
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What decides the bits of a computation, beside the program."""
    kinds = sorted({"cpu", device.type})
    return {
        "slimgrad": slimgrad.__version__,
        "torch": str(torch.__version__),
        "accelerator": _accelerator(device),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
        "autocast": str([(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]),
    }


def loss_name(loss_fn: LossFn) -> str:
    """By which a loss function is known: its module and name; of an object, its type's."""
    named = loss_fn if hasattr(loss_fn, "__qualname__") else type(loss_fn)
    return f"{named.__module__}.{named.__qualname__}"


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was, in words; the first ten."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    shown = [f"{name}: {saved.get(name, 'absent')}, now {now.get(name, 'absent')}" for name in names[:10]]
    return shown + ([f"and {len(names) - 10} more"] if len(names) > 10 else [])


def _named(context: Any) -> Iterator[tuple[str, Any]]:
    if context is not None:
        yield from zip(tree.paths(context), tree.leaves(context), strict=True)


def _accelerator(device: torch.device) -> str:
    """The GPU and what chooses its kernels; "none" on a CPU."""
    if device.type != "cuda":
        return "none" if device.type == "cpu" else device.type
    cudnn = torch.backends.cudnn
    return f"{torch.cuda.get_device_name(device)}, cuDNN {cudnn.version()}, TF32 in cuDNN {cudnn.allow_tf32}"
