"""Does a loss add up over tokens? Asked of the loss itself, once a call, on a few tokens of its first chunk.

A mean can be written in more ways than a graph shows (a masked sum over a count, a root, a layout `[batch, classes,
time]`), and a sum in ways that look like a mean. So the loss of a few tokens is compared with what it gives for the
same tokens twice over, for their two halves, and in reverse order: a sum doubles, its halves add up, and it knows no
order (a last step, a difference of neighbours, a weight by position in the chunk do). Losses per token are those of
each half, and of the reverse order. Metrics are looked at as well: one whose shape grows with the tokens has a time
axis, and chunks of it do not add up.

The tokens are copies, in float64 where the loss takes it; the generators are put back. What cannot be asked so (a loss
that draws at random or counts its calls, outputs without a time axis, no token that counts) is judged by its graph.

Cost: six losses of at most 64 tokens, once a call (with metrics over chunks of one token, in each). Terms below a
hundred-thousandth of the loss are not seen.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgrad.call.losses import cross_entropy_sum, is_counted, is_mean_over_time, token_cross_entropy
from slimgrad.errors import InputError
from slimgrad.sweep import tree
from slimgrad.sweep.cut import Span
from slimgrad.sweep.random import generators, seeded

_MOST_TOKENS = 64
_ELEMENTS = 1 << 20  # of outputs and targets, in all
# How far a sum may be off, over the largest of the losses; a mean is off by a half at least. Measured over 200 draws of
# 64 tokens: in float64 at most 5e-16, where the loss casts to float32 3e-7 (8e-6 if signs cancel), to bfloat16 0.015
_OFF, _OFF_NARROW = 1e-5, 0.1
_NOISE = 100  # times what another order of the tokens changes; measured: rounding is 3 times that at most
_ROUNDING = 1e-5  # of a loss whose terms cancel, over the terms
_ORDER = 1e-3  # over the largest of the losses: more is no rounding of another order (narrow: `_OFF_NARROW`)


class _Asked(NamedTuple):
    """What a loss gave: of some tokens, of them twice over; whether that is a sum (None: nobody can tell)."""

    once: float
    twice: float
    adds_up: bool | None
    growing: str | None  # the name of a metric whose shape grows with the tokens


def compared_anyway(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a loss that need not be a sum, since whoever calls it compares with plain backpropagation."""
    loss_fn.slimgrad_compared_anyway = True  # type: ignore[attr-defined]
    return loss_fn


class SumCheck:
    """What is known of the loss of one call.

    Args:
        loss_fn: (outputs, targets) -> a loss, or a dict with "loss".
        devices: of the model.
        by_targets: whether the losses are divided by the number of targets.

    Attributes:
        chunks: of all sequences of the call.
        settled: whether there is nothing more to ask.
    """

    def __init__(
        self, loss_fn: Callable[..., Any] | None, devices: Sequence[torch.device], *, by_targets: bool
    ) -> None:
        ours = loss_fn in (None, cross_entropy_sum, token_cross_entropy)
        self.settled = ours or hasattr(loss_fn, "slimgrad_compared_anyway")
        self.chunks = 1
        self._loss_fn, self._devices, self._by_targets = loss_fn, devices, by_targets
        self._can_ask = True

    def require(self, result: Any, outputs: Any, targets: Any, batch: int, span: Span, chunks: int) -> None:
        """Raise InputError where `result`, the loss of a chunk, or a metric beside it does not add up.

        Args:
            result: what `loss_fn` gave for the chunk.
            outputs, targets: what it was given.
            batch, span: of the chunk.
            chunks: of its sequence. A mean of one chunk is right, if it is not divided by the targets once more.
        """
        # of one token a mean over the batch is left, which adds up
        adds_up_anyway = span.stop - span.start == 1 or (chunks == 1 and not self._by_targets)
        if adds_up_anyway and (self.chunks == 1 or not isinstance(result, dict)):
            return
        asked = self._ask(outputs, targets, batch, span) if self._can_ask else None
        if self.chunks > 1:
            _require_additive_metrics(result, None if asked is None else asked.growing, asked is None, batch, span)
        if adds_up_anyway:
            return
        if asked is not None and asked.adds_up is not None:
            self.settled = True
            if not asked.adds_up:
                raise _refusal(asked, chunks)
        elif is_mean_over_time(_loss(result), batch, span):
            raise _refusal(None, chunks)

    def _ask(self, outputs: Any, targets: Any, batch: int, span: Span, *, per_token: bool = False) -> _Asked | None:
        time = span.stop - span.start
        leaves, spec = tree.flatten((outputs, targets))
        held = [_held(leaf) for leaf in leaves]
        tensors = [x for values in held for x in values if isinstance(x, Tensor)]
        plain = all(x is None or isinstance(x, Tensor | bool | int | float | str) for values in held for x in values)
        if not plain or not tensors or any(x.shape[:2] != (batch, time) for x in tensors):
            self._can_ask = False
            return None
        numbers = max(sum(x.numel() for x in tensors) // time, 1)  # of a token
        tokens = _chosen(tensors_within(targets), time, _ELEMENTS // numbers, tensors[0].device)

        def asked(wide: bool) -> _Asked | None:
            taken = list[Tensor]()

            def pick(x: Tensor, index: Tensor) -> Tensor:
                taken.append(_picked(x, index, wide))
                return taken[-1]

            def loss_of(index: Tensor) -> Any:
                taken.clear()
                given = [_with_tensors(leaf, lambda x: pick(x, index)) for leaf in leaves]
                assert self._loss_fn is not None
                return self._loss_fn(*tree.unflatten(given, spec))

            def gradients_of(index: Tensor) -> list[tuple[Tensor, Tensor]]:
                with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):  # also where no graph is kept
                    loss = _loss(loss_of(index))
                takers = [x for x in taken if x.requires_grad]
                found = torch.autograd.grad(loss, takers, allow_unused=True, materialize_grads=True)
                return [(g, x.detach()) for g, x in zip(found, takers, strict=True)]

            if per_token:
                return self._compare_per_token(loss_of, tokens)
            found = self._compare(loss_of, tokens)
            if found is not None and found.adds_up is False and _cancels(gradients_of, tokens, found):
                found = found._replace(adds_up=True)
            return found

        device = tensors[0].device.type
        for wide in (True, False) if device != "mps" else (False,):
            with ExitStack() as stack:
                stack.enter_context(seeded(0, *self._devices))
                if "torch._dynamo" in sys.modules:  # another shape would be compiled anew
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                if wide:
                    stack.enter_context(torch.autocast(device, enabled=False))
                try:
                    found = asked(wide)
                except Exception:  # noqa: BLE001  whatever somebody else's loss raises of float64, or few tokens
                    continue
            self._can_ask = found is not None
            return found
        self._can_ask = False
        return None

    def _compare(self, loss_of: Callable[[Tensor], Any], tokens: Tensor) -> _Asked | None:
        """None where the loss draws at random or is another at each call."""
        before = [generator.get_state() for generator in generators(*self._devices)]
        twice_over, half = torch.cat([tokens, tokens]), len(tokens) // 2
        few, many = loss_of(tokens), loss_of(twice_over)
        losses = [_loss(few), _loss(many), _loss(loss_of(tokens)), _loss(loss_of(tokens.flip(0)))]
        losses += [_loss(loss_of(part)) for part in (tokens[:half], tokens[half:]) if half]
        once, twice, again, flipped, *parts = torch.stack([x.detach().double() for x in losses]).tolist()
        after = [generator.get_state() for generator in generators(*self._devices)]
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) or (once != again and once == once):
            return None
        growing = next((name for name, a, b in _metrics(few, many) if a.shape != b.shape), None)
        if not 0 < abs(once) < float("inf") or not abs(twice) < float("inf"):
            return _Asked(once, twice, None, growing)
        off, scale = abs(twice - 2 * once), max(map(abs, [once, twice, *parts]))
        if parts and scale < float("inf"):
            off = max(off, abs(sum(parts) - once))
        least, most = _tolerances(losses[0])
        noise = abs(flipped - once)
        allowed = max(least * scale, min(_NOISE * noise, most * scale))
        adds_up = not off > allowed and not noise > most * scale  # of a NaN among the halves nothing follows
        return _Asked(once, twice, adds_up, growing)

    def require_per_token(self, outputs: Any, targets: Any, batch: int, span: Span) -> None:
        """Raise InputError where the losses of tokens depend on the tokens beside them.

        Args:
            outputs, targets: what they are computed from.
            batch, span: of the chunk.
        """
        if span.stop - span.start == 1 or not self._can_ask:
            return
        asked = self._ask(outputs, targets, batch, span, per_token=True)
        self.settled = asked is None or asked.adds_up is not None
        if asked is not None and asked.adds_up is False:
            raise InputError(
                f"loss_fn of {span} looks along time: a token's loss is another when the tokens beside it are others "
                "(a difference of neighbours, a norm over the chunk), so that it would depend on where chunks are cut. "
                "Expected the loss of each token from its own output and target; for others use slimgrad.outputs"
            )

    def _compare_per_token(self, loss_of: Callable[[Tensor], Any], tokens: Tensor) -> _Asked | None:
        """None where the losses are others at each call."""
        half = len(tokens) // 2
        if not half:
            return None
        first, again = (loss_of(tokens).detach().double() for _ in range(2))
        flipped = loss_of(tokens.flip(0)).detach().double().flip(1)
        parts = torch.cat([loss_of(part).detach().double() for part in (tokens[:half], tokens[half:])], 1)
        if not torch.equal(first, again) or not bool(first.isfinite().all()):
            return None
        off = max(float((x - first).abs().max()) for x in (flipped, parts))
        scale, most = float(first.abs().max()), _tolerances(loss_of(tokens))[1]
        return _Asked(scale, scale, not off > most * scale if scale else None, None)  # of zeros nothing follows


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _cancels(gradients_of: Callable[[Tensor], list[tuple[Tensor, Tensor]]], tokens: Tensor, asked: _Asked) -> bool:
    """Whether a loss is the rounding of terms that cancel (advantages with a mean of zero), of which nothing follows,
    and the gradient of each token is the same whatever tokens are beside it.
    """
    half = len(tokens) // 2
    if not half or not torch.is_grad_enabled():
        return False
    try:
        ways = [gradients_of(index) for index in (tokens, tokens.flip(0), tokens[:half], tokens[half:])]
    except Exception:  # noqa: BLE001  a loss without a graph, say
        return False
    terms = sum(float((g * x).abs().sum()) for g, x in ways[0])
    if not max(abs(asked.once), abs(asked.twice)) < _ROUNDING * terms:
        return False
    for (x, _), (y, _), (a, _), (b, _) in zip(*ways, strict=True):
        most = _ORDER * float(x.abs().max())
        if not all(bool((x - other).abs().max() <= most) for other in (y.flip(1), torch.cat([a, b], 1))):
            return False
    return True


def _tolerances(loss: Tensor) -> tuple[float, float]:
    """What rounding may make of a sum, and of another order of it, over the loss."""
    wide = loss.dtype in (torch.float64, torch.float32) and not torch.is_autocast_enabled(loss.device.type)
    return (_OFF, _ORDER) if wide else (_OFF_NARROW, _OFF_NARROW)


def _chosen(targets: Sequence[Tensor], time: int, most: int, device: torch.device) -> Tensor:
    """A power of two of tokens, evenly over those whose targets count: groups of tokens stay whole."""
    counts = torch.ones(time, dtype=torch.bool, device=device)
    for x in targets:
        if x.dim() == 2 and not x.is_floating_point() and not x.is_complex():
            counts &= (x if x.dtype == torch.bool else is_counted(x)).any(0)
    found = counts.nonzero()[:, 0]
    found = found if len(found) else torch.arange(time, device=device)
    number = 1 << (min(len(found), max(most, 2), _MOST_TOKENS).bit_length() - 1)
    return found[torch.arange(number, device=device) * len(found) // number]


def _picked(x: Tensor, index: Tensor, wide: bool) -> Tensor:
    """The tokens of `index`: a copy, with a graph of its own where `x` has one."""
    picked = x.detach().index_select(1, index)
    if wide and x.is_complex():
        picked = picked.to(torch.complex128)
    elif wide and x.is_floating_point():
        picked = picked.double()
    return picked.requires_grad_(x.requires_grad and torch.is_grad_enabled())


def tensors_within(given: Any) -> list[Tensor]:
    """The tensors of a tree, those in attributes of its objects (dataclasses that nobody registered) among them."""
    return [x for leaf in tree.leaves(given) for x in _held(leaf) if isinstance(x, Tensor)]


def _held(leaf: Any) -> list[Any]:
    """What an object holds in attributes; anything else itself."""
    return [leaf] if isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__") else list(vars(leaf).values())


def _with_tensors(leaf: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The leaf, or a copy of the object, with `function` applied to its tensors."""
    if isinstance(leaf, Tensor):
        return function(leaf)
    if not hasattr(leaf, "__dict__"):
        return leaf
    copied = copy.copy(leaf)
    vars(copied).update({name: function(x) for name, x in vars(leaf).items() if isinstance(x, Tensor)})
    return copied


def _loss(result: Any) -> Tensor:
    loss = result["loss"] if isinstance(result, dict) else result
    assert isinstance(loss, Tensor)
    return loss


def _metrics(few: Any, many: Any) -> list[tuple[str, Tensor, Tensor]]:
    if not isinstance(few, dict):
        return []
    return [(name, torch.as_tensor(x), torch.as_tensor(many[name])) for name, x in few.items() if name != "loss"]


def _require_additive_metrics(result: Any, growing: str | None, unasked: bool, batch: int, span: Span) -> None:
    if not isinstance(result, dict):
        return
    if unasked:  # then by its shape alone
        along = (batch, span.stop - span.start)
        growing = next((n for n, x in result.items() if n != "loss" and torch.as_tensor(x).shape[:2] == along), None)
    if growing is not None:
        raise InputError(
            f"loss_fn returned the metric {growing!r} with a time axis, shape "
            f"{list(torch.as_tensor(result[growing]).shape)} for {span}; metrics are added up over the chunks, which "
            "would add up unrelated tokens. Return its sum over the chunk; for numbers per token use slimgrad.outputs "
            "or token_loss"
        )


def _refusal(asked: _Asked | None, chunks: int) -> InputError:
    instead = "Use reduction='sum', or .sum() in place of .mean()"
    if chunks == 1:
        instead += "; or, as the whole is one chunk here, normalizer=1, which takes a mean as it is"
    whole = "the chunks add up to the loss of the whole, which slimgrad then divides by the number of targets"
    if asked is None or abs(asked.twice - asked.once) <= 0.01 * abs(asked.once):
        return InputError(
            f"loss_fn returned the mean over its chunk; expected the sum, so that {whole} (normalizer=). {instead}"
        )
    return InputError(
        f"loss_fn does not add up over tokens: of a few tokens it gives {asked.once:.6g}, of the same ones twice over "
        f"{asked.twice:.6g}, or of their halves, or in another order, something else; expected a sum over tokens, each "
        f"from its own output and target, so that {whole} "
        f"(normalizer=). {instead}; what is no sum over tokens is added outside, to slimgrad.loss, or computed from "
        "slimgrad.outputs"
    )
