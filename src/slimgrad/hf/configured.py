"""Is the model still the one that its configuration describes? The certificate is of the configuration alone.

A field that is changed on a model that is there already reaches some of its code and not the rest: masks and caches are
made from the configuration in every forward, layers keep what they read when they were built.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from slimgrad.errors import ModelError
from slimgrad.hf.shrink import CALM, LEFT_OUT
from slimgrad.states.values import is_plain_value

Fields = dict[str, Any]
# what decides nothing about how a sequence is computed, or is looked at in every forward; trainers set some of them
_FREE = {
    *CALM,
    *LEFT_OUT,
    "use_cache",
    "return_dict",
    "vocab_size",
    "tie_word_embeddings",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "keys_to_ignore_at_inference",
    "pretraining_tp",
}
_ACROSS = ("window", "sliding", "layer_type", "attention_type", "chunk", "local", "rope_type")  # in names of attributes


def decisive(config: Any) -> Fields:
    """The fields that decide how the model runs, those of its parts by path."""
    return dict(_flat(config.to_dict(), ""))


def _flat(fields: Fields, path: str) -> Fields:
    found: Fields = {}
    for name, value in fields.items():
        if name in _FREE or name.startswith("output_") or name.endswith(("_token_id", "_token_index")):
            continue
        if isinstance(value, dict) and "model_type" in value:
            found |= _flat(cast(Fields, value), f"{path}{name}.")
        else:
            found[path + name] = value
    return found


def refuse_changed(before: Fields, config: Any) -> None:
    """Raise if a decisive field is another than it was when the model was enabled."""
    now = decisive(config)
    if now == before:
        return
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changes = ", ".join(f"{name} from {before.get(name)} to {now.get(name)}" for name in names)
    raise ModelError(
        f"the model's configuration was changed since slimgrad.hf.enable ({changes}), which its certificate is not of. "
        "Expected slimgrad.hf.disable(model), the change, and slimgrad.hf.enable(model)"
    )


def refuse_layers_unlike(inner: nn.Module) -> None:
    """Raise if layers keep another window or kind than the configuration gives: it was changed since they were built.

    A comparison over a few tokens does not see it, since no window is full by then.
    """
    try:
        with torch.device("meta"):
            fresh = cast(Any, type(inner))._from_config(cast(Any, inner).config)
    except Exception:  # noqa: BLE001  # a class that is not built from its configuration alone says nothing here
        return
    own = dict(inner.named_modules())
    for path, module in fresh.named_modules():
        other = own.get(path)
        if type(other) is not type(module):  # an adapter's, say
            continue
        for name, expected in vars(module).items():
            value = vars(cast(nn.Module, other)).get(name)
            if any(part in name for part in _ACROSS) and is_plain_value(expected) and value != expected:
                raise ModelError(
                    f"{path}.{name} is {value}, while the model's configuration gives {expected}: it was changed after "
                    "the model was built, and reaches only some of its layers. Expected the change on the "
                    "configuration that the model is built from: from_pretrained(..., config=config)"
                )
