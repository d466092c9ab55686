"""The state of any optimiser as named tensors and a few words of JSON, and back, in every bit.

A tensor's name is "parameter:key" ("parameter:key.0" within a list); numbers, words and the settings of the parameter
groups are in the JSON, beside where each tensor belongs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slimgrad.errors import InputError

Tensors = dict[str, Tensor]


def pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, str]:
    """The state of an optimiser of the model's parameters: its tensors by name, and the rest as JSON.

    Raises:
        InputError: it holds what is neither a tensor, a number, a word, nor a list or dictionary of these, or
            parameters that are not the model's.
    """
    names, saved = _names(model, optimizer), optimizer.state_dict()
    tensors: Tensors = {}
    state = {names[number]: _pack(values, f"{names[number]}:", tensors) for number, values in saved["state"].items()}
    groups = [
        _pack({k: v for k, v in group.items() if k != "params"}, f"group {index}:", tensors)
        for index, group in enumerate(saved["param_groups"])
    ]
    return tensors, json.dumps({"state": state, "groups": groups})


def unpack(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: str | None) -> None:
    """Put what `pack` gave into an optimiser of the same parameters.

    Args:
        model, optimizer: as `pack` had them; the optimiser may be new.
        tensors: copied, so that they lie where torch allocates: some kernels choose their path by the alignment.
        rest: None: as earlier versions saved it, tensors alone.
    """
    numbers = {name: number for number, name in enumerate(_names(model, optimizer))}
    current = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    if rest is None:
        for key, value in tensors.items():
            name, _, moment = key.rpartition(":")
            state.setdefault(numbers[name], {})[moment] = value.clone()
        groups = current
    else:
        packed = json.loads(rest)
        state = {numbers[name]: _unpack(values, tensors) for name, values in packed["state"].items()}
        saved = [_unpack(values, tensors) for values in packed["groups"]]
        groups = [now | before for now, before in zip(current, saved, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _keep_dtypes(optimizer, state)


def _keep_dtypes(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """torch casts what it loads to the parameter's dtype: moments of a 16-bit parameter in float32 would lose bits."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def as_saved(loaded: Any, saved: Any) -> Any:
        wanted = isinstance(saved, Tensor) and loaded.dtype != saved.dtype
        return saved.to(loaded.device) if wanted else loaded

    for number, saved in state.items():
        optimizer.state[parameters[number]] = pytree.tree_map(as_saved, optimizer.state[parameters[number]], saved)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameters' names in the order in which the optimiser numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in names for parameter in parameters)
    if foreign:
        raise InputError(f"optimiser: expected parameters of the model alone, found {foreign} that it has not")
    return [names[id(parameter)] for parameter in parameters]


def _pack(value: Any, path: str, tensors: Tensors) -> Any:
    if type(value) in (Tensor, nn.Parameter):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    # a path that ends in ":" is complete with the key alone
    join = path if path.endswith(":") else f"{path}."
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        if all(isinstance(key, (int, str)) for key, _ in pairs):
            return {"dict": [[key, _pack(one, f"{join}{key}", tensors)] for key, one in pairs]}
    if type(value) in (list, tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(one, f"{join}{index}", tensors) for index, one in enumerate(value)]}
    raise InputError(
        f"optimiser state {path}: expected tensors, numbers, words, and lists and dictionaries of these, got "
        f"{type(value).__name__}"
    )


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = cast("dict[str, Any]", packed).items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "dict":
        return {key: _unpack(one, tensors) for key, one in content}
    values = [_unpack(one, tensors) for one in content]
    return values if kind == "list" else tuple(values)
