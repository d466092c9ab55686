"""What a base model's forward was given, as sequences to sweep: documents of packed rows, padding, what is refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from slimgrad.errors import InputError
from slimgrad.hf.step import CACHE_NAMES

PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
DOCUMENTS = ("position_ids", "seq_idx", *_LENGTHS)  # what tells the documents of a row apart
# what changes nothing in training: the mask, the cache and the shape of the answer are ours to make
_IGNORED = (
    "attention_mask",
    "use_cache",
    "return_dict",
    "labels",  # the head's, handed through by models of several parts
    "shift_labels",
    "ignore_index",
    "logits_to_keep",
    "num_items_in_batch",
    "cache_position",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    *_LENGTHS,
    *CACHE_NAMES,
)
_WHOLE = {
    "output_hidden_states": "every layer's hidden states along the whole sequence are what chunks do not keep",
    "output_attentions": "attention weights are quadratic in the length",
}

_AT_PADDING = (
    "the loss reads the model's outputs at padding (where attention_mask is zero), which chunks do not compute; "
    "expected labels of -100 there"
)


@dataclass
class Batch:
    """Sequences to sweep, and how their outputs become those of the rows that were given.

    Attributes:
        sequences: each a dict of tensors `[batch, time, ...]`.
        is_packed: whether rows were cut into documents; then they are in the rows' order.
        rows: rows that were given.
        time: their length.
        mask: `[rows, time]`, False at padding; None without any.
    """

    sequences: list[dict[str, Tensor]]
    is_packed: bool
    rows: int
    time: int
    mask: Tensor | None

    def __post_init__(self) -> None:
        self._lengths = [next(iter(one.values())).shape[1] for one in self.sequences]
        self.sequences = [_at_least_two(one) for one in self.sequences]

    def assembled(self, outputs: list[Tensor]) -> Tensor:
        """One output's parts as `[rows, time, ...]`, ones at padding."""
        outputs = [x[:, :length] for x, length in zip(outputs, self._lengths, strict=True)]
        if self.is_packed:
            whole = torch.cat([x.flatten(0, 1) for x in outputs])
            whole = whole.view(self.rows, self.time, *whole.shape[1:])
        else:
            (whole,) = outputs
        return whole if self.mask is None else cast(Tensor, _RealTokens.apply(whole, self.mask))


def _at_least_two(sequence: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sequence of one token with that token once more, whose outputs nobody sees: many models take another path for
    one token alone, which writes in place.
    """
    if next(iter(sequence.values())).shape[1] != 1:
        return sequence
    return {name: torch.cat([x, x + (name == "position_ids")], 1) for name, x in sequence.items()}


def read_batch(
    given: dict[str, Any], config: Any, *, padding: int | None, takes_positions: bool, starts_anywhere: bool
) -> Batch:
    """Check what the base model was given, and cut it into sequences.

    Args:
        given: the keyword arguments of its forward.
        config: the model's.
        padding: the token that moves later positions wherever it stands (models that count positions so); or None.
        takes_positions: whether the model's forward takes `position_ids`, by name or among others.
        starts_anywhere: whether these may begin at another position than 0.

    Raises:
        InputError: what chunks cannot do exactly, by name.
    """
    given = {name: value for name, value in given.items() if value is not None}
    _refuse(given, config)
    tensors = {name: cast(Tensor, given[name]) for name in PER_TOKEN if name in given}
    if ("input_ids" in tensors) == ("inputs_embeds" in tensors):
        raise InputError("expected input_ids or inputs_embeds, one of them")
    tokens = tensors["inputs_embeds"] if "inputs_embeds" in tensors else tensors["input_ids"]
    rows, time = tokens.shape[:2]
    positions = tensors.pop("position_ids", None)
    if positions is not None:
        if positions.dim() != 2 or positions.shape[1] != time or positions.shape[0] not in (1, rows):
            raise InputError(
                f"position_ids of shape {list(positions.shape)}: expected [batch, time] = [{rows}, {time}]; several "
                "position axes (images, video) are not supported in chunks"
            )
        positions = positions.expand(rows, time)
    mask = _padding(given.get("attention_mask"), tokens)
    starts = _document_starts(given, positions, mask, rows, time)
    if padding is not None and "input_ids" in tensors:
        _refuse_padding_inside(tensors["input_ids"], padding)
    if positions is not None and takes_positions:
        firsts = positions[:, 0] if starts is None else positions[starts]
        if not starts_anywhere and bool(firsts.any()):
            raise InputError(
                f"position_ids begin at {int(firsts.max())}: this model computes something else by them in a whole "
                "pass than in chunks. Expected 0 at the start of every document"
            )
        tensors["position_ids"] = positions
    if starts is None:
        return Batch([tensors], False, rows, time, mask)
    edges = [*starts.flatten().nonzero().flatten().tolist(), rows * time]
    flat = {name: x.expand(rows, time, *x.shape[2:]).flatten(0, 1) for name, x in tensors.items()}
    sequences = [
        {name: x[start:stop, None] if are_single else x[None, start:stop] for name, x in flat.items()}
        for start, stop, are_single in _documents(edges)
    ]
    return Batch(sequences, True, rows, time, mask)


def _documents(edges: list[int]) -> list[tuple[int, int, bool]]:
    """From where each document starts: (start, stop, False) of one; (start, stop, True) of a run of single tokens, as
    padding to a multiple of a length comes, which go together as rows.
    """
    found: list[tuple[int, int, bool]] = []
    for start, stop in pairwise(edges):
        is_single = stop == start + 1
        if is_single and found and found[-1][2]:
            found[-1] = (found[-1][0], stop, True)
        else:
            found.append((start, stop, is_single))
    return found


def _refuse(given: dict[str, Any], config: Any) -> None:
    for name, why in _WHOLE.items():
        if given.get(name, getattr(config, name, False)):
            raise InputError(
                f"{name}=True in training: {why}. Turn it off, or slimgrad.hf.disable(model) for this call"
            )
    for name in CACHE_NAMES:
        if name in given:
            raise InputError(
                f"{name} was given in training (prefix tuning does so): a gradient into a cache is not supported. "
                "Prompt tuning (inputs_embeds) and LoRA are; or slimgrad.hf.disable(model) for this call"
            )
    known = {*PER_TOKEN, *_IGNORED, *_WHOLE, "output_router_logits"}
    strange = sorted(name for name, value in given.items() if name not in known and value is not False)
    if strange:
        raise InputError(
            f"the model was given {', '.join(strange)} in training, of which slimgrad does not know how it is cut into "
            f"chunks; expected {', '.join(PER_TOKEN)} and attention_mask. Leave it out, or slimgrad.hf.disable(model)"
        )


def refuse_cache(given: dict[str, Any]) -> None:
    """Raise where a cache is asked for by name: there is none to hand on."""
    if given.get("use_cache") is True:
        raise InputError(
            "use_cache=True in training: a pass in chunks returns no cache, since a gradient through it is not "
            "supported. Leave use_cache out, and pass the whole sequence in one call"
        )


def without_silent_zeros(given: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What was given but for those `names` that are all zero: a processor's kinds of tokens, where all is text."""
    return {n: x for n, x in given.items() if not (n in names and isinstance(x, Tensor) and not bool(x.any()))}


def refuse_targets_at_padding(targets: Tensor, mask: Any) -> None:
    """Raise, before any work, where a target is predicted from padding.

    Args:
        targets: `[rows, time]`, -100 is ignored.
        mask: the attention mask, or None.
    """
    real = _padding(mask, targets)
    if real is not None and bool(((targets != -100) & ~real).any()):
        raise InputError(_AT_PADDING)


def _padding(mask: Any, tokens: Tensor) -> Tensor | None:
    """`[rows, time]`, False at padding on the right; None without any."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
        came = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask of {came}: expected [batch, time] = {list(tokens.shape[:2])}, zeros at padding. Masks of "
            "the model's own making (4-D, block masks) are not supported in chunks"
        )
    real = mask.to(tokens.device).bool()
    if bool(real.all()):
        return None
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise InputError(
            "attention_mask has zeros before ones (padding on the left, or holes): padding would run through the "
            "model's state. Pad on the right: tokenizer.padding_side = 'right'"
        )
    return real


def _document_starts(
    given: dict[str, Any], positions: Tensor | None, mask: Tensor | None, rows: int, time: int
) -> Tensor | None:
    """`[rows, time]`, True where a document starts, if a row holds more than one; else None."""
    device = given["input_ids" if "input_ids" in given else "inputs_embeds"].device
    starts = torch.zeros(rows, time, dtype=torch.bool, device=device)
    named = ""
    if positions is not None:
        jumps = positions[:, 1:] != positions[:, :-1] + 1
        forward = positions[:, 1:] > positions[:, :-1] + 1
        if bool((forward if mask is None else forward & mask[:, 1:]).any()):
            raise InputError(
                "position_ids jump forward within a row, which says neither that it is one document nor where another "
                "begins (transformers takes it for both, by whether there is a cache). Expected positions that rise by "
                "one, and start anew at 0 where a document does"
            )
        starts[:, 1:] = jumps if mask is None else jumps & mask[:, 1:]
        named = "position_ids"
    for name in (*_LENGTHS, "seq_idx"):
        if name not in given:
            continue
        found = torch.zeros_like(starts)
        if name == "seq_idx":
            which = given[name].to(device).view(rows, time)
            found[:, 1:] = which[:, 1:] != which[:, :-1]
        else:
            ends = given[name].to(device).long()
            found.view(-1)[ends[ends < rows * time]] = True
        found[:, 0] = False
        if named and not torch.equal(found, starts):
            raise InputError(f"{name} names other documents than {named}; expected them to agree")
        starts, named = found, name
    if not bool(starts[:, 1:].any()):
        return None
    if given.get("attention_mask") is not None:
        raise InputError(
            "rows of several documents (position_ids that start anew) came with an attention_mask, with which "
            "transformers itself does not keep them apart. Leave attention_mask out (TRL's packing and "
            "DataCollatorWithFlattening do), or pass one document per row"
        )
    starts[:, 0] = True
    return starts


def padding_token(config: Any) -> int | None:
    """The model's padding token."""
    return getattr(config.get_text_config(), "pad_token_id", None)


def _refuse_padding_inside(tokens: Tensor, padding: int) -> None:
    pads = tokens == padding
    if bool((pads[:, :-1] & ~pads[:, 1:]).any()):
        raise InputError(
            f"token {padding} (the padding token) stands before other tokens: this model counts positions by it, over "
            "the whole row, which chunks do not see. Pass position_ids, or keep the padding token to the right"
        )


class _RealTokens(torch.autograd.Function):
    """Ones at padding; a gradient that arrives there is refused, since padding is computed otherwise than in a whole
    pass. Not zeros, where many a loss (a sum of squares) has no gradient and would go unseen.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, outputs: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return outputs.masked_fill(~mask.view(*mask.shape, *[1] * (outputs.dim() - 2)), 1)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,), (mask,) = grad_outputs, cast("tuple[Tensor]", cast(Any, ctx).saved_tensors)
        if bool(gradient[~mask].any()):
            raise InputError(_AT_PADDING)
        return gradient, None
