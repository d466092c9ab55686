"""Is a model's class exact in chunks? Its own code, small, in float64, against plain backpropagation: every gradient.

A comparison on the model's own weights in its own dtype cannot say so: a wrong model differs from the whole as much as
from other chunkings, hides in the noise of 16 bits, and never fills its window in a few hundred tokens. So the class is
built from the user's configuration, shrunk (see `shrink`), in float64 with its casts widened, and compared over chunks
around its window, with a remainder of one token, and on both sides of thresholds of its rotary embedding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import slimgrad
from slimgrad.errors import ModelError, SlimgradError, StorageError
from slimgrad.hf import mends
from slimgrad.hf.attention import NAME as OURS
from slimgrad.hf.attention import is_transformers_own
from slimgrad.hf.batch import PER_TOKEN, TOKEN_TYPES
from slimgrad.hf.certificate import CHUNKS, LENGTH, TOLERANCE, Certificate
from slimgrad.hf.comparing import Plain, built, error, outputs_differ, plain, undisturbed
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.shrink import ALTERNATIVES, ORIGINAL, VOCABULARY, shrunk, shrunk_fields
from slimgrad.hf.step import CACHE_NAMES
from slimgrad.hf.widen import widened
from slimgrad.runs.files import write_atomically

_BATCH = 2
_CAUSAL = 1e-6  # relative: less is rounding
_UNBUILT = ("its class could not be built small", "its own forward fails on a small model")
_CHECKPOINTING = {"use_reentrant": False}


def certify(model: nn.Module, *, cached: bool = True) -> Certificate:
    """The certificate of a model's class with its configuration: looked up, or made in about two seconds.

    Args:
        model: a transformers model, or a PEFT model around one; its weights are not looked at.
        cached: whether a certificate on disk will do (`~/.cache/slimgrad/certificates`, or `SLIMGRAD_CACHE`).

    Returns:
        A certificate, which may say no.

    Raises:
        ModelError: it is no model of transformers.
    """
    inner = inner_model(model)
    return certify_class(type(inner), cast(Any, inner).config, cached=cached)


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model within PEFT's."""
    get = getattr(model, "get_base_model", None)
    inner = get() if callable(get) else model
    if not isinstance(inner, nn.Module) or not hasattr(inner, "config"):
        raise ModelError(f"expected a transformers model, got {type(model).__name__}")
    return inner


def certify_class(kind: type[Any], config: Any, *, cached: bool = True) -> Certificate:
    """The same, from a class and its configuration."""
    attention = _attention(config)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "slimgrad": slimgrad.__version__}
    blank = Certificate(model=f"{kind.__name__} ({config.model_type})", attention=attention, versions=versions)
    place = _place(kind, config, attention, versions)
    known = None if place is None or not cached else _read(place)
    if known is not None:
        return known
    found = _certified(kind, config, blank)
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(asdict(found), indent=1).encode())
        except (OSError, StorageError):
            pass  # a home that cannot be written to: it is made again next time
    return found


def _attention(config: Any) -> str:
    """What to compare with: the model's own implementation, or sdpa for those that have no float64."""
    named = getattr(config, "_attn_implementation", None) or "sdpa"
    return named if named in ("eager", "sdpa", "slimgrad") or not is_transformers_own(named) else "sdpa"


def _place(kind: type[Any], config: Any, attention: str, versions: dict[str, str]) -> Path | None:
    """Where the certificate lies: by all that it depends on. None for a class whose code cannot be read, or where other
    code has taken the place of transformers', of which its version says nothing.
    """
    if not is_transformers_own(attention) or _is_patched(kind):
        return None
    try:
        home = Path(os.environ.get("SLIMGRAD_CACHE") or Path.home() / ".cache" / "slimgrad")
        code = [inspect.getfile(one) for one in kind.__mro__ if one.__module__.split(".")[0] not in _OTHERS]
    except (RuntimeError, TypeError, OSError):
        return None
    files = sorted({inspect.getfile(kind), *code, *map(str, Path(__file__).parent.rglob("*.py"))})
    sources = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).exists()]
    what = [kind.__module__, kind.__qualname__, shrunk_fields(config, {}), attention, versions, sources]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return home / "certificates" / f"{config.model_type}-{digest[:24]}.json"


_OTHERS = ("builtins", "torch", "transformers", "typing", "abc")  # by their versions


def _is_patched(kind: type[Any]) -> bool:
    """Whether in the file of a class of transformers' a function, a method or a class is somebody else's."""
    for module in {sys.modules[one.__module__] for one in kind.__mro__ if ".models." in one.__module__}:
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            parts = vars(value).values() if own else [value]
            if any((inspect.isfunction(x) or inspect.isclass(x)) and not _is_known(x) for x in parts):
                return True
    return False


def _is_known(code: Any) -> bool:
    """Whether a function or a class is of Python, of torch, or of transformers and what it imports."""
    module = (code.__module__ or "").split(".")[0]
    file = code.__code__.co_filename if inspect.isfunction(code) else getattr(sys.modules.get(module), "__file__", "")
    packages = [str(Path(str(one.__file__)).parent) for one in (torch, transformers)]
    homes = (*packages, str(dataclasses.__file__), "<string>")
    return module in ("accelerate", *sys.stdlib_module_names) or (file or "").startswith(homes)


def _read(place: Path) -> Certificate | None:
    """None: not there, not to be read, or damaged."""
    try:
        return Certificate(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _certified(kind: type[Any], config: Any, blank: Certificate) -> Certificate:
    first: Certificate | None = None
    for alternative in ALTERNATIVES:
        with undisturbed():
            try:
                model = built(kind, shrunk(config, alternative), blank.attention)
            except Exception as problem:  # noqa: BLE001  # whatever a class raises for sizes that do not fit together
                found = replace(blank, reason=f"{_UNBUILT[0]}: {_words(problem)}")
            else:
                found = _compared(model, blank)
        if not found.reason.startswith(_UNBUILT):
            return found
        first = first or found
    assert first is not None
    return first


def _words(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


def _compared(model: Any, blank: Certificate) -> Certificate:
    """Compare a small model in chunks with its own whole pass."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    if table is None:
        return replace(blank, reason="it has no single table of input embeddings; expected tokens [batch, time]")
    tokens = torch.randint(3, min(table.shape[0], VOCABULARY), (_BATCH, LENGTH))
    with widened():
        try:
            whole = plain(model, tokens)
        except Exception as problem:  # noqa: BLE001  # whatever a model raises for what does not fit it
            return replace(blank, reason=f"{_UNBUILT[1]}: {_words(problem)}")
        try:
            return _in_chunks(model, whole, blank)
        except SlimgradError as problem:
            return replace(blank, reason=" ".join(str(problem).split()))
        except Exception as problem:  # noqa: BLE001  # a class that cannot be run in chunks says so in its own words
            return replace(blank, reason=f"its forward fails in chunks: {_words(problem)}")


def _in_chunks(model: Any, whole: Plain, blank: Certificate) -> Certificate:
    known = replace(blank, base=_base_of(model), head=None if model.get_output_embeddings() is None else "whole")
    base = model.get_submodule(known.base)
    moved = _moved_by_later(base, whole.tokens)
    if moved > _CAUSAL:
        return replace(known, reason=f"not causal: later tokens move earlier outputs by {moved:.1e}")
    known = replace(known, mend=mends.mend_of(model, base))
    worst = float("inf")
    for attention, counts in ((OURS, False), (None, False), (None, True)):
        known = replace(known, chunk_attention=attention, counts_from_chunk=counts)
        if attention is None or (blank.attention == "sdpa" and is_transformers_own("sdpa")):
            worst = _worst(whole, known)
            if worst <= TOLERANCE:
                break
    else:
        return replace(known, error=worst, reason=_wrong(worst))
    if depends_on_length(base):  # below the length up to which frequencies are the original ones
        worst = max(worst, error(plain(model, whole.tokens[:, : ORIGINAL - 4]), known, CHUNKS[1]))
    known, of_head = _head(whole, known)
    worst = max(worst, of_head)
    if worst > TOLERANCE:
        return replace(known, error=worst, reason=_wrong(worst))
    step = mends.step_for(model, known, chunk=CHUNKS[0])
    return replace(
        known,
        is_exact=True,
        error=worst,
        states=step.state_kinds(),
        takes=_takes(step, whole.tokens),
        starts_anywhere=_starts_anywhere(step, whole.tokens),
        silent_zeros=_silent_zeros(base, whole.tokens),
        counts_padding=_counts_padding(model, step),
        checkpoints=_checkpoints(whole, known),
    )


def _moved_by_later(base: Any, tokens: Tensor) -> float:
    later = tokens.clone()
    later[:, LENGTH // 2 :] = 5
    with torch.no_grad():
        found, other = (base(input_ids=x, use_cache=False).last_hidden_state for x in (tokens, later))
    return ((found - other)[:, : LENGTH // 2].norm() / found.norm()).item()


def _worst(whole: Plain, known: Certificate) -> float:
    """Over all chunks; an attention function that lacks what the class wants is as wrong as can be."""
    worst = 0.0
    try:
        for chunk in CHUNKS[:-1]:
            worst = max(worst, error(whole, known, chunk))
            if worst > TOLERANCE:
                break
    except Exception:
        if known.chunk_attention is None:
            raise
        whole.model.zero_grad(set_to_none=True)
        return float("inf")
    return worst


def _wrong(worst: float) -> str:
    return f"a gradient in chunks differs from plain backpropagation's by {worst:.1e} (relative, float64)"


def _head(whole: Plain, known: Certificate) -> tuple[Certificate, float]:
    """The cheapest way to take the head that is exact, and its error."""
    model, tokens = whole.model, whole.tokens
    if known.head is None:
        return known, error(whole, known, CHUNKS[-1])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    in_place = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    known = replace(known, shifts_labels=not torch.isclose(in_place, whole.loss, rtol=1e-9, atol=0))
    for head in ("linear", "pieces"):
        tried = replace(known, head=head)
        try:
            found = error(whole, tried, CHUNKS[-1])
        except Exception:  # noqa: BLE001  # a head that cannot be taken so is taken whole
            model.zero_grad(set_to_none=True)
            continue
        if found <= TOLERANCE:
            return tried, found
    return known, error(whole, known, CHUNKS[-1])


def _base_of(model: Any) -> str:
    """The outermost module inside that is handed the cache: seen by a hook, not guessed from a name."""
    special = mends.base_of(model)
    if special is not None:
        return special
    names = inspect.signature(type(model).forward).parameters
    name = next((n for n in CACHE_NAMES if n in names), None)
    if name is None:
        raise ModelError("its forward takes no cache of transformers' (past_key_values, cache_params)")
    cache, seen = transformers.DynamicCache(config=model.config), list[str]()

    def see(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if any(x is cache for x in (*args, *kwargs.values())):
                seen.append(path)

        return hook

    hooks = [m.register_forward_pre_hook(see(path), with_kwargs=True) for path, m in model.named_modules() if path]
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, 3), 5), use_cache=True, **{name: cache})
    finally:
        for hook in hooks:
            hook.remove()
    for path in seen:  # a base that takes tokens; otherwise the model itself is the base
        if {"input_ids", "inputs_embeds"} & inspect.signature(
            type(model.get_submodule(path)).forward
        ).parameters.keys():
            return path
    if model.get_output_embeddings() is None and seen:
        return ""
    raise ModelError("no module inside of it takes tokens and the cache")


def _takes(step: Any, tokens: Tensor) -> list[str]:
    """The inputs per token that give the same outputs in chunks as in a whole pass."""
    names = set(inspect.signature(type(step.base).forward).parameters)
    if step.takes_positions:
        names.add("position_ids")
    at = torch.arange(tokens.shape[1]).expand_as(tokens)
    beside = {"position_ids": at, "token_type_ids": at // 4 % 2}
    tried: dict[str, dict[str, Tensor]] = {"input_ids": {"input_ids": tokens}}
    tried |= {name: {"input_ids": tokens, name: value} for name, value in beside.items() if name in names}
    if "inputs_embeds" in names:
        with torch.no_grad():
            tried["inputs_embeds"] = {"inputs_embeds": step.base.get_input_embeddings()(tokens)}
    return [name for name in PER_TOKEN if name in tried and not _differs(step, tried[name])]


def _starts_anywhere(step: Any, tokens: Tensor) -> bool:
    """Whether positions that begin later give the same in chunks; where frequencies depend on the length, a whole pass
    takes the last position for it.
    """
    at = torch.arange(3, 3 + tokens.shape[1]).expand_as(tokens)
    return not depends_on_length(step.base) and not _differs(step, {"input_ids": tokens, "position_ids": at})


def _silent_zeros(base: Any, tokens: Tensor) -> list[str]:
    """The kinds of tokens that change nothing where they are all zero: text, beside images."""
    names = inspect.signature(type(base).forward).parameters

    def outputs(**given: Tensor) -> Tensor:
        with torch.no_grad():
            return base(input_ids=tokens, use_cache=False, **given).last_hidden_state

    alone = outputs()
    return [name for name in TOKEN_TYPES if name in names and alone.equal(outputs(**{name: torch.zeros_like(tokens)}))]


def _differs(step: Any, given: dict[str, Tensor]) -> bool:
    try:
        return outputs_differ(step, given, CHUNKS[1], TOLERANCE)
    except Exception:  # noqa: BLE001  # what cannot be given to chunks is not taken
        return True


def _counts_padding(model: Any, step: Any) -> bool:
    """Whether the padding token, in the middle of a row, moves what comes after it, as it does not in chunks."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if not isinstance(pad, int) or pad < 0:
        return False
    tokens = torch.randint(3, 50, (1, LENGTH))
    tokens[:, 5] = pad
    return outputs_differ(step, {"input_ids": tokens}, CHUNKS[1], TOLERANCE)


def _checkpoints(whole: Plain, known: Certificate) -> bool:
    """Whether transformers' own activation checkpointing within chunks gives the same gradients."""
    model = whole.model
    if not model.supports_gradient_checkpointing:
        return False
    try:
        model.activation_checkpointing_enable(_CHECKPOINTING)
        return error(whole, known, CHUNKS[-1]) <= TOLERANCE
    except Exception:  # noqa: BLE001  # whatever a second run of a layer raises
        model.zero_grad(set_to_none=True)
        return False
    finally:
        model.activation_checkpointing_disable()
