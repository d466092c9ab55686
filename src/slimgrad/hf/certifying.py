"""Is a model's class exact in chunks? Its own code, small, in float64, against plain backpropagation: every gradient.

A comparison on the model's own weights in its own dtype cannot say so: a wrong model differs from the whole as much as
from other chunkings, hides in the noise of 16 bits, and never fills its window in a few hundred tokens. So the class is
built from the user's configuration, shrunk (see `shrink`), in float64 with its casts widened, and compared over chunks
around its window, with a remainder of one token, and on both sides of thresholds of its rotary embedding.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import slimgrad
from slimgrad.errors import ModelError, SlimgradError, StorageError
from slimgrad.hf import mends
from slimgrad.hf.attention import NAME as OURS
from slimgrad.hf.certificate import CHUNKS, LENGTH, TOLERANCE, Certificate
from slimgrad.hf.forwards import install, uninstall
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.shrink import ALTERNATIVES, ORIGINAL, VOCABULARY, shrunk, shrunk_fields
from slimgrad.hf.step import CACHE_NAMES
from slimgrad.hf.widen import widened
from slimgrad.runs.files import write_atomically

FLOOR = 1e-6  # of all gradients together: what a gradient that is zero by mathematics is measured against
_MOST_PARAMETERS = 30_000_000
_BATCH = 2
_SMALL_STD = 0.05  # weights with less are drawn anew: zero or tiny ones would hide gradients
_STD = 0.15


def certify(model: nn.Module, *, cached: bool = True) -> Certificate:
    """The certificate of a model's class with its configuration: looked up, or made in about two seconds.

    Args:
        model: a transformers model; its weights are not looked at.
        cached: whether a certificate on disk will do (`~/.cache/slimgrad/certificates`, or `SLIMGRAD_CACHE`).

    Returns:
        A certificate, which may say no.
    """
    return certify_class(type(model), cast(Any, model).config, cached=cached)


def certify_class(kind: type[Any], config: Any, *, cached: bool = True) -> Certificate:
    """The same, from a class and its configuration."""
    attention = _attention(config)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "slimgrad": slimgrad.__version__}
    blank = Certificate(model=f"{kind.__name__} ({config.model_type})", attention=attention, versions=versions)
    place = _place(kind, config, attention, versions)
    if cached and place.exists():
        try:
            return Certificate(**json.loads(place.read_text()))
        except (ValueError, TypeError):
            pass  # damaged: made anew
    found = _certified(kind, config, blank)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(asdict(found), indent=1).encode())
    except (OSError, StorageError):
        pass  # a home that cannot be written to: it is made again next time
    return found


def _attention(config: Any) -> str:
    """What to compare with: the model's own implementation, or sdpa for those that have no float64."""
    named = getattr(config, "_attn_implementation", None) or "sdpa"
    return named if named in ("eager", "sdpa", "slimgrad") else "sdpa"


def _place(kind: type[Any], config: Any, attention: str, versions: dict[str, str]) -> Path:
    folder = Path(os.environ.get("SLIMGRAD_CACHE", Path.home() / ".cache" / "slimgrad")) / "certificates"
    code = [Path(inspect.getfile(kind)), *sorted(Path(__file__).parent.glob("*.py"))]
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in code if path.exists()]
    what = [kind.__module__, kind.__qualname__, shrunk_fields(config, {}), attention, versions, sources]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return folder / f"{config.model_type}-{digest[:24]}.json"


class _Comparison(NamedTuple):
    """Of one small model: its tokens, and plain backpropagation's loss and gradients."""

    model: Any
    tokens: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    def error(self) -> float:
        """The largest relative error of the gradients that the model's parameters have now, which are taken away."""
        total = torch.stack([g.norm() for g in self.gradients.values()]).norm().item()
        worst = 0.0
        for name, p in self.model.named_parameters():
            expected = self.gradients.get(name)
            got, p.grad = p.grad, None
            if expected is None and got is None:
                continue
            wanted = torch.zeros_like(p) if expected is None else expected
            distance = ((0 if got is None else got) - wanted).norm() / max(wanted.norm().item(), FLOOR * total)
            worst = max(worst, distance.item() if distance.isfinite() else float("inf"))
        return worst


def _certified(kind: type[Any], config: Any, blank: Certificate) -> Certificate:
    first: Certificate | None = None
    for alternative in ALTERNATIVES:
        with _undisturbed():
            try:
                model = _small(kind, shrunk(config, alternative), blank.attention)
            except Exception as error:  # noqa: BLE001  # whatever a class raises for sizes that do not fit together
                found = replace(blank, reason=f"its class could not be built small: {_words(error)}")
            else:
                found = _compared(model, blank)
        if not found.reason.startswith(("its class could not be built", "its own forward fails")):
            return found
        first = first or found
    assert first is not None
    return first


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _undisturbed() -> Generator[None]:
    """The caller's random numbers and default dtype, and transformers' warnings, stay as they are."""
    level, dtype = transformers.logging.get_verbosity(), torch.get_default_dtype()
    transformers.logging.set_verbosity(50)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            transformers.logging.set_verbosity(level)
            torch.set_default_dtype(dtype)


def _small(kind: type[Any], config: Any, attention: str) -> nn.Module:
    """The class, built small in float64, its weights large enough for every gradient to be seen."""
    torch.set_default_dtype(torch.float64)
    errors: list[Exception] = []
    for how in (
        {"experts_implementation": "eager"},
        {},
        {"experts_implementation": "eager", "eager": True},
        {"eager": True},
    ):
        options = {"attn_implementation": "eager" if how.get("eager") else attention}
        options |= {k: v for k, v in how.items() if k != "eager"}
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in kind._from_config(config, **options).parameters())
            if count > _MOST_PARAMETERS:
                raise ModelError(f"its small configuration still has {count:,} parameters")
            model = kind._from_config(config, **options)
            break
        except Exception as error:  # noqa: BLE001  # whatever a class raises for options that it does not know
            errors.append(error)
    else:
        raise errors[-1]
    model = model.double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2 and p.std() < _SMALL_STD:
                p.normal_(0, _STD)
    return model


def _compared(model: Any, blank: Certificate) -> Certificate:
    """Compare a small model in chunks with its own whole pass."""
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(3, min(rows, VOCABULARY), (_BATCH, LENGTH))
    with widened():
        try:
            plain = _plain(model, tokens)
            hidden, later = _hidden(model, tokens), tokens.clone()
            later[:, LENGTH // 2 :] = 5
            moved = (hidden - _hidden(model, later))[:, : LENGTH // 2 - 1].norm() / hidden.norm()
        except Exception as error:  # noqa: BLE001  # whatever a model raises for a configuration that does not fit it
            return replace(blank, reason=f"its own forward fails on a small model: {_words(error)}")
        if moved > FLOOR:
            return replace(blank, reason=f"not causal: later tokens move earlier outputs by {moved.item():.1e}")
        try:
            return _in_chunks(model, plain, blank)
        except SlimgradError as error:
            return replace(blank, reason=" ".join(str(error).split()))
        except Exception as error:  # noqa: BLE001  # a class that cannot be run in chunks says so in its own words
            return replace(blank, reason=f"its forward fails in chunks: {_words(error)}")


def _hidden(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False)
    return found["logits"] if "logits" in found else found[0]


def _loss(model: Any, tokens: Tensor) -> Tensor:
    """The model's own loss; of a model without a head, a weighted sum of its hidden states."""
    if model.get_output_embeddings() is not None and "labels" in inspect.signature(type(model).forward).parameters:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss
    hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
    return (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden).sin()).sum()


def _plain(model: Any, tokens: Tensor) -> _Comparison:
    model.zero_grad(set_to_none=True)
    loss = _loss(model, tokens)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return _Comparison(model, tokens, loss.detach(), gradients)


def _in_chunks(model: Any, plain: _Comparison, blank: Certificate) -> Certificate:
    known = replace(blank, base=_base_of(model), head=_has_head(model))
    base = model.get_submodule(known.base)
    known = replace(known, mend=mends.mend_of(model, base))
    errors = list[float]()
    for attention, counts in ((OURS, False), (None, False), (None, True)):
        known = replace(known, chunk_attention=attention, counts_from_chunk=counts)
        if attention is None or blank.attention == "sdpa":
            errors = _errors(plain, known)
            if max(errors) <= TOLERANCE:
                break
    else:
        return replace(known, error=max(errors), reason=_wrong(max(errors)))
    if depends_on_length(base):  # below the length up to which frequencies are the original ones
        errors.append(_error(_plain(model, plain.tokens[:, : ORIGINAL - 4]), known, CHUNKS[1]))
    known = replace(known, states=_states(model, known), counts_padding=_counted_padding(model, known))
    known, error = _head(plain, known)
    errors.append(error)
    if max(errors) > TOLERANCE:
        return replace(known, error=max(errors), reason=_wrong(max(errors)))
    return replace(known, is_exact=True, error=max(errors))


def _errors(plain: _Comparison, known: Certificate) -> list[float]:
    """Over all chunks; an attention function that lacks what the class wants is as wrong as can be."""
    try:
        return [_error(plain, known, chunk) for chunk in CHUNKS[:-1]]
    except Exception:
        if known.chunk_attention is None:
            raise
        plain.model.zero_grad(set_to_none=True)
        return [float("inf")]


def _wrong(error: float) -> str:
    return f"a gradient in chunks differs from plain backpropagation's by {error:.1e} (relative, float64)"


def _error(plain: _Comparison, known: Certificate, chunk: int) -> float:
    install(plain.model, known, chunk=chunk).around = widened
    try:
        loss = _loss(plain.model, plain.tokens)
        torch.autograd.backward(loss)
    finally:
        uninstall(plain.model)
    distance = ((loss.detach() - plain.loss) / plain.loss).abs().item()
    return max(plain.error(), distance if distance == distance else float("inf"))


def _has_head(model: Any) -> str | None:
    return None if model.get_output_embeddings() is None else "whole"


def _head(plain: _Comparison, known: Certificate) -> tuple[Certificate, float]:
    """The cheapest way to take the head that is exact, and its error."""
    model, tokens = plain.model, plain.tokens
    if known.head is None:
        return known, _error(plain, known, CHUNKS[-1])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    in_place = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    known = replace(known, shifts_labels=not torch.isclose(in_place, plain.loss, rtol=1e-9, atol=0))
    for head in ("linear", "pieces"):
        tried = replace(known, head=head)
        try:
            error = _error(plain, tried, CHUNKS[-1])
        except Exception:  # noqa: BLE001  # a head that cannot be taken so is taken whole
            plain.model.zero_grad(set_to_none=True)
            continue
        if error <= TOLERANCE:
            return tried, error
    return known, _error(plain, known, CHUNKS[-1])


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


def _states(model: Any, known: Certificate) -> list[str]:
    step = mends.step_for(model, known, chunk=CHUNKS[0])
    return step.state_kinds()


def _counted_padding(model: Any, known: Certificate) -> bool:
    """Whether the padding token, in the middle of a row, moves what comes after it, as it does not in chunks."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if not isinstance(pad, int) or pad < 0:
        return False
    tokens = torch.randint(3, 50, (1, 20))
    tokens[:, 5] = pad
    step = mends.step_for(model, known, chunk=CHUNKS[0])
    if depends_on_length(step.base):
        return False
    with torch.no_grad():
        whole = step.original(input_ids=tokens, use_cache=False).last_hidden_state
        parts = slimgrad.outputs(step, {"input_ids": tokens}, chunk=7)["last_hidden_state"]
    return bool((whole - parts).norm() > TOLERANCE * whole.norm())
