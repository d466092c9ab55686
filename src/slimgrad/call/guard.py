"""What a model may not do to its weights and buffers while it runs, and how it was set when its loss was computed.

Three looks: at the options of torch's embeddings, before anything runs; at the versions of weights and buffers, around
every chunk; at modes and plain attributes, which the reverse sweep finds as the forward sweep did.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.call.watch import attributes
from slimgrad.errors import ConsumedError, ModelError
from slimgrad.states.checksum import checksum
from slimgrad.states.tensors import version
from slimgrad.states.values import is_plain_value

_SAMPLE = 16  # elements of a weight


class Guard:
    """Refuses a model that writes to its buffers or parameters while a chunk runs.

    Args:
        model: whose.
        written: parameters that may be written to, by their ids: the table of an `nn.Embedding(max_norm=...)` nobody
            else uses, and those of `set_to_themselves`.
    """

    def __init__(self, model: nn.Module, written: set[int]) -> None:
        self._places = [
            (module, name)
            for module in model.modules()
            for name in module._buffers  # pyright: ignore[reportPrivateUsage]
        ]
        self._parameters = [(name, p) for name, p in model.named_parameters() if id(p) not in written]
        self._samples: list[Tensor] = []
        self._left: tuple[list[Tensor], list[int], list[Any]] | None = None  # buffers and versions, after a chunk

    @contextmanager
    def watching(self, *, first: bool = False) -> Generator[None]:
        """Refuse what is written within the block.

        A buffer may be replaced by a larger one that begins with it, or filled where it was None (a table, made when it
        is wanted): it is put back as it was. `watch` asks who reads it.

        The first time nothing is written to buffers even so, and values are compared too: torch's batch normalisation
        writes its running statistics without counting a version, and so does a write through `.data`. Of parameters a
        few elements are compared. The other times, weights and buffers are as the block before left them.

        Raises:
            ModelError: something was written to within the block.
            ConsumedError: something was written to since the block before.
        """
        places = [(m, name, m._buffers.get(name)) for m, name in self._places]  # pyright: ignore[reportPrivateUsage]
        buffers = [(module, name, buffer) for module, name, buffer in places if buffer is not None]
        copies = [buffer.clone() if first else buffer for _, _, buffer in buffers]
        versions = [version(x) for x in copies]
        weights = self._weights(first)
        if not first:
            self._refuse_changed(buffers, versions, weights)
        changed: list[str] = []
        try:
            for (module, name, _), copy in zip(buffers, copies, strict=True):
                module._buffers[name] = copy  # pyright: ignore[reportPrivateUsage]
            yield
            for (module, name, buffer), copy, before in zip(buffers, copies, versions, strict=True):
                written = version(copy) != before
                present = module._buffers.get(name)  # pyright: ignore[reportPrivateUsage]
                if present is not copy:
                    written = written or not _begins_with(present, copy)
                if written or (first and readable(copy) and int(checksum(copy)) != int(checksum(buffer))):
                    changed.append(f"{type(module).__name__}.{name}")
        finally:
            for module, name, buffer in places:
                module._buffers[name] = buffer  # pyright: ignore[reportPrivateUsage]
        if changed:
            raise ModelError(
                f"the model wrote to its buffers while it ran: {', '.join(changed)}. Each chunk runs twice, so the "
                "second run would see other values and the gradient would not be exact. Put such layers in eval mode "
                "(batch normalisation; of a spectral norm its parametrisation), or carry what they update in the state"
            )
        after = self._weights(first)
        if weights != after:
            names = [name for (name, _), b, a in zip(self._parameters, weights, after, strict=True) if a != b]
            raise ModelError(
                f"parameters were written to while a chunk ran: {', '.join(names)}. The chunks before and after would "
                "use other weights, and the gradient would belong to neither. Clip or renormalise weights between "
                "calls, beside optimizer.step(); a table with max_norm may not be tied to another layer"
            )

    def _refuse_changed(
        self, buffers: list[tuple[nn.Module, str, Tensor]], versions: list[int], weights: list[Any]
    ) -> None:
        """Raise if a weight or a buffer is not as it was after the chunk before."""
        tensors = [x for _, _, x in buffers]
        left, self._left = self._left, (tensors, versions, weights)
        if left is None or (list(map(id, left[0])), *left[1:]) == (list(map(id, tensors)), versions, weights):
            return
        names = [name for (name, _), then, now in zip(self._parameters, left[2], weights, strict=True) if then != now]
        before = {id(x): number for x, number in zip(*left[:2], strict=True)}
        for (module, name, x), number in zip(buffers, versions, strict=True):
            if before.get(id(x)) != number:
                names.append(f"{type(module).__name__}.{name}")
        raise ConsumedError(
            f"parameters or buffers were written to between two chunks: {', '.join(names) or 'a buffer is gone'}. The "
            "chunks before and after would use other values, and the gradient would belong to neither. Change them "
            "when the gradient is there, beside optimizer.step(), and not in on_chunk"
        )

    def _weights(self, sampled: bool) -> list[Any]:
        versions = [version(p) for _, p in self._parameters]
        if not sampled:
            return versions
        if not self._samples:
            self._samples = [_sample(p) for _, p in self._parameters]
        return list(zip(versions, [str(x) for x in _lists(self._samples)], strict=True))  # as text NaN equals itself


def _begins_with(present: Tensor | None, before: Tensor) -> bool:
    """Whether a buffer was replaced by a larger one that begins with it."""
    if present is None or present.dim() != before.dim() or present.dtype != before.dtype:
        return False
    if any(now < then for now, then in zip(present.shape, before.shape, strict=True)):
        return False
    return int(checksum(present[tuple(slice(n) for n in before.shape)])) == int(checksum(before))


def readable(x: Tensor) -> bool:
    """Whether the elements of `x` are in memory, one after the other."""
    return x.layout is torch.strided and not x.is_nested and not x.is_quantized and x.device.type != "meta"


def _sample(p: Tensor) -> Tensor:
    """A few elements, as a view."""
    x = getattr(p.detach(), "_local_tensor", p.detach())  # a DTensor's own part
    if not readable(x):
        return torch.zeros(0)
    while x.dim() > 1 and x.numel():
        x = x[-1]
    return x.reshape(-1)[:_SAMPLE]


def _lists(samples: list[Tensor]) -> list[list[Any]]:
    """The elements of each, those of one kind fetched together."""
    found: list[list[Any]] = [[] for _ in samples]
    for kind in {(x.dtype, x.device) for x in samples}:
        places = [i for i, x in enumerate(samples) if (x.dtype, x.device) == kind]
        values = torch.cat([samples[i] for i in places]).tolist()
        for i in places:
            found[i], values = values[: samples[i].numel()], values[samples[i].numel() :]
    return found


class CalledWith:
    """How a model was set when its first sweep ran: plain attributes, modes, frozen weights, default dtype; and tensors
    that may not change until it is reversed.

    What a module holds beside is not restored; where it changed a loss, the loss is compared (see `witness`).

    Args:
        model: its parameters and buffers are among these tensors.
        others: what the call was given beside.
    """

    def __init__(self, model: nn.Module, others: Sequence[Tensor]) -> None:
        written = set_to_themselves(model)
        parameters = [p for p in model.parameters() if id(p) not in written]
        self._versions = [(x, version(x)) for x in (*parameters, *model.buffers(), *others)]
        self._values = [
            (module.__dict__, name, value)
            for module in model.modules()
            for name, value in attributes(module)
            if is_plain_value(value) and name in module.__dict__
        ]
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self._dtype = torch.get_default_dtype()

    def settings(self, model: nn.Module) -> dict[str, str]:
        """Attributes that are numbers, and their values, by path. Words (the name of a run) decide little."""
        paths = {id(module.__dict__): f"{path}." if path else "" for path, module in model.named_modules()}
        found = [x for x in self._values if x[1] != "training" and isinstance(x[2], int | float | tuple)]
        return {f"attribute {paths[id(own)]}{name}": repr(value) for own, name, value in found}

    @contextmanager
    def restored(self) -> Generator[None]:
        """Within the block the model is set as it was; then as it is now.

        Raises:
            ConsumedError: a tensor was written to.
        """
        if any(version(x) != before for x, before in self._versions):
            raise ConsumedError(
                "a parameter, an input, a target or a state was modified between the loss and its backward, so the "
                "chunks cannot be rebuilt as they were. Expected backward before optimizer.step(), and before buffers "
                "are reused"
            )
        missing = object()
        values = [
            (own, name, now, then)
            for own, name, then in self._values
            if (now := own.get(name, missing)) is not then and (type(now) is not type(then) or now != then)
        ]
        thawed = [p for p in self._frozen if p.requires_grad]
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(self._dtype)
            for own, name, _, then in values:
                own[name] = then
            for p in thawed:
                p.requires_grad_(False)
            yield
        finally:
            for p in thawed:
                p.requires_grad_(True)
            for own, name, now, _ in values:
                if now is missing:
                    own.pop(name, None)
                else:
                    own[name] = now
            torch.set_default_dtype(dtype)


def backward_hooks(module: nn.Module) -> list[Any]:
    """The full backward hooks of a module: they are handed gradients of what it returned and was given."""
    return [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]  # pyright: ignore[reportPrivateUsage]


def refuse_backward_hooks(model: nn.Module) -> None:
    """Raise where a module has one: it would run for every chunk by itself, on a part of the gradient."""
    everywhere = torch.nn.modules.module
    of_all = everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    found = [name or type(model).__name__ for name, module in model.named_modules() if backward_hooks(module)]
    if found or of_all:
        raise ModelError(
            f"{', '.join(found[:3]) or 'every module'} has a backward hook (register_full_backward_hook), which would "
            "run for every chunk by itself, on the gradient of a part of the sequence: what it changes would be wrong. "
            "Expected none: remove it, or register a hook on parameters (p.register_hook), which is handed the whole "
            "gradient once"
        )


def set_to_themselves(model: nn.Module) -> set[int]:
    """The ids of parameters that the model says it sets to their own values while it runs, which counts as a write:
    `torch.nn.utils.parametrize.register_parametrization` within forward does so.
    """
    if not hasattr(model, "set_to_themselves"):
        return set()
    return {id(p) for p in cast(Any, model).set_to_themselves()}


def refuse_by_options(model: nn.Module, takes_gradient: Callable[[Tensor], bool]) -> set[int]:
    """Refuse what cannot be exact in chunks, by the options of torch's embeddings.

    Returns:
        The ids of the tables that are renormalised on the way (`max_norm`) and used by one layer alone.
    """
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():  # pyright: ignore[reportPrivateUsage]
            if p is not None:
                users.setdefault(id(p), []).append(f"{path}.{name}" if path else name)
    renormalised: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.scale_grad_by_freq and takes_gradient(module.weight):
            raise counted_by_frequency(path)
        if module.max_norm is not None:
            names = users[id(module.weight)]
            if len(names) > 1:
                raise ModelError(
                    f"{path} renormalises its table on the way (max_norm), and the table is also {', '.join(names)}: "
                    "chunks would use other weights than the chunks after them. Untie it, or renormalise between calls"
                )
            renormalised.add(id(module.weight))
    return renormalised


def counted_by_frequency(where: str) -> ModelError:
    """`scale_grad_by_freq` counts a token within the chunk, not within the sequence."""
    return ModelError(
        f"{where}: scale_grad_by_freq divides a token's gradient by how often it occurs in the chunk, so the sum over "
        "the chunks is not the gradient of the whole. Turn it off"
    )
