"""The published code's weights, read into a Performer of ours and written back.

The published code is that of the paper: google-research/google-research, `performer/models/slim_performer/pytorch`. Its
class `SLiMPerformer` and our Performer as published are one function of the same numbers. They differ in names, and in
one matrix, which keys and values share here:

| published | shape | here |
|---|---|---|
| `input_map.weight` | [vocabulary, d / 2] | `embed.weight` |
| `layers.N.attention.q_map` | [d, d], [d] | `layers.N.query` |
| `layers.N.attention.k_map` | [d, d], [d] | `layers.N.key_value`, rows 0 to d - 1 |
| `layers.N.attention.v_map` | [d, d], [d] | `layers.N.key_value`, rows d to 2 d - 1 |
| `layers.N.layernorm1` | [d], [d] | `layers.N.attention_norm` |
| `layers.N.U_map` | [d_ff, d], [d_ff] | `layers.N.expand` |
| `layers.N.V_map` | [d, d_ff], [d] | `layers.N.contract` |
| `layers.N.layernorm2` | [d], [d] | `layers.N.feedforward_norm` |
| `output_logit_map` | [vocabulary, d], [vocabulary] | `head` |

A module of two shapes has a `weight` and a `bias`. Positions have no weights: the same sinusoids fill the other half of
the embedding, and in float32 the published code rounds their angles.

What the weights do not tell are arguments of its constructor, and must be known. Nothing could notice a wrong one:

| published | here |
|---|---|
| `n_heads` | `heads` |
| `feature_type="sqr"`, `"relu"`, `"elu+1"` | `feature_map="square"`, `"relu"`, `"elu1"` |
| `feature_type="favor+"`, `"favor+_N"` | refused: see below |
| `on_gptln=True`, `False` | `norm="output"`, `"pre"` |
| `compute_type="iter"`, `"ps"`, `"parallel_ps"` | no matter: three ways to compute the same sums |

Its random features ("favor+") are drawn anew in every call, for each layer its own; ours are drawn once a sequence, for
all layers, and their directions have other lengths. No weights say which were drawn, so there is no model of ours that
computes the same.

Its `train.py` saves nothing. A checkpoint is what `torch.save(model.state_dict(), file)` writes.

Cost: one copy of the weights.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slimgrad.errors import InputError
from slimgrad.models.performer import Performer
from slimgrad.models.shapes import PerformerConfig

# our module -> the published ones whose rows it holds, in their order
_MODULES = {
    "embed": ("input_map",),
    "query": ("attention.q_map",),
    "key_value": ("attention.k_map", "attention.v_map"),
    "attention_norm": ("layernorm1",),
    "expand": ("U_map",),
    "contract": ("V_map",),
    "feedforward_norm": ("layernorm2",),
    "head": ("output_logit_map",),
}
_FEATURE_MAPS = {"sqr": "square", "relu": "relu", "elu+1": "elu1"}
# what unpickling anything else may raise
_UNREADABLE = (
    EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, struct.error, pickle.UnpicklingError,
)  # fmt: skip


def read_published(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the published code, on the CPU. No code in the file is run.

    Raises:
        InputError: no such file, one that torch cannot read without running code, or one that holds something other
            than named tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: expected a checkpoint of the published code, got: {error}") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: expected what torch.save(model.state_dict(), file) writes, found a file that torch does not read "
            "with weights_only=True, which runs no code in it"
        ) from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: expected a model's state_dict, found a {type(found).__name__}")
    return _require_tensors(cast("Mapping[str, Any]", found))


def from_published(
    state_dict: Mapping[str, Any], *, heads: int, feature_type: str = "sqr", on_gptln: bool = True
) -> Performer:
    """The Performer that computes what a `SLiMPerformer` of the published code does.

    Layers, widths and vocabulary are read from the tensors' shapes, and the model has their dtype and device. It shares
    no memory with them, and no random number is drawn.

    Args:
        state_dict: the published names and tensors, as in the table above; `read_published` reads a file of them.
        heads, feature_type, on_gptln: what its constructor was given (`heads` as `n_heads`); the defaults are those of
            its `train.py`, where `n_heads` is 8.

    Raises:
        InputError: names that are missing, unexpected, or of a wrong shape or type, each of them told; a `feature_type`
            that is not one of the three; a number of heads that does not divide the width.

    >>> model = Performer(PerformerConfig(layers=1, width=8, heads=2))
    >>> from_published(to_published(model), heads=2).config == model.config
    True
    """
    if feature_type not in _FEATURE_MAPS:
        raise InputError(
            f"feature_type={feature_type!r}: expected one of {list(_FEATURE_MAPS)}. Random features ('favor+') are "
            "drawn anew in each call of the published code, in a way of its own: no Performer here computes the same"
        )
    tensors = _require_tensors(state_dict)
    layers = len({name.split(".")[1] for name in tensors if re.match(r"layers\.\d+\.", name)})
    _require_names(tensors, _shapes(PerformerConfig(layers=max(layers, 1), width=4, heads=1)))
    vocabulary, half = _matrix(tensors, "input_map.weight")
    feedforward, _ = _matrix(tensors, "layers.0.U_map.weight")
    config = PerformerConfig(
        layers=layers,
        width=2 * half,
        heads=heads,
        feedforward=0 if feedforward == 8 * half else feedforward,  # 0: the usual 4 * width
        vocabulary=vocabulary,
        feature_map=_FEATURE_MAPS[feature_type],
        norm="output" if on_gptln else "pre",
    )
    _require_shapes(tensors, _shapes(config))
    with torch.device("meta"):
        model = Performer(config)
    joined = {name: torch.cat([tensors[one].detach() for one in _names(name)]) for name in model.state_dict()}
    model.load_state_dict(joined, assign=True)
    return model


def to_published(model: Performer) -> dict[str, Tensor]:
    """The weights under the published names: `SLiMPerformer.load_state_dict` takes them. Copies, in the model's dtype.

    Raises:
        InputError: the published code has no such model; what differs is told.
    """
    published_arguments(model.config)
    return published_names(model.state_dict())


def published_arguments(config: PerformerConfig) -> dict[str, Any]:
    """What `SLiMPerformer` is built with to be this model, but for `compute_type`.

    Raises:
        InputError: the published code has no such model; what differs is told.
    """
    wanted: dict[str, tuple[Any, ...]] = {
        "feature_map": tuple(_FEATURE_MAPS.values()),
        "norm": ("output", "pre"),
        "normalize": (True,),
        "output_projection": (False,),
        "taps": (1,),
    }
    other = [
        f"{name}={getattr(config, name)!r} (only {' or '.join(repr(value) for value in values)})"
        for name, values in wanted.items()
        if getattr(config, name) not in values
    ]
    if other:
        raise InputError(f"the published code has no such model: {', '.join(other)}")
    return {
        "vocab_size": config.vocabulary,
        "hidden_dim": config.width,
        "n_layers": config.layers,
        "ffn_dim": config.feedforward_width,
        "n_heads": config.heads,
        "feature_type": next(theirs for theirs, ours in _FEATURE_MAPS.items() if ours == config.feature_map),
        "on_gptln": config.norm == "output",
    }


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of our parameters (weights, gradients) -> copies by the published names."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        theirs = _names(name)
        pieces = value.detach().chunk(len(theirs))
        found |= {one: piece.clone() for one, piece in zip(theirs, pieces, strict=True)}
    return found


def _names(name: str) -> list[str]:
    """The published names of the tensors that one of ours holds, in the order of its rows."""
    *path, module, kind = name.split(".")
    return [".".join([*path, theirs, kind]) for theirs in _MODULES[module]]


def _shapes(config: PerformerConfig) -> dict[str, torch.Size]:
    """The shapes that the published names have in a model of this shape."""
    with torch.device("meta"):
        model = Performer(config)
    return {name: value.shape for name, value in published_names(model.state_dict()).items()}


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    shape = tensors[name].shape
    if len(shape) != 2:
        raise InputError(f"published weights: {name} {list(shape)}, expected two dimensions")
    return shape[0], shape[1]


def _require_tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Refuse what is not a tensor of one floating-point type, each by its name."""
    others = [f"{name} ({type(value).__name__})" for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"published weights: expected tensors by name, found others: {', '.join(others)}. Pass the model's own "
            "state_dict, not a dictionary around it"
        )
    tensors = cast("dict[str, Tensor]", dict(found))
    first = next((value.dtype for value in tensors.values() if value.is_floating_point()), torch.float32)
    others = [f"{name} ({value.dtype})" for name, value in tensors.items() if value.dtype != first]
    if others:
        raise InputError(f"published weights: expected all in {first}, found others: {', '.join(others)}")
    return tensors


def _require_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
    faults = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("missing", [name for name in wanted if name not in tensors]),
            ("unexpected", [name for name in tensors if name not in wanted]),
        )
        if names
    ]
    if faults:
        raise InputError(
            f"published weights: {'; '.join(faults)}. Expected the names of SLiMPerformer.state_dict(), with "
            "layers from 0 on"
        )


def _require_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise InputError(
            f"published weights: wrong shapes: {', '.join(wrong)}. Widths are read from input_map.weight and "
            "layers.0.U_map.weight"
        )
