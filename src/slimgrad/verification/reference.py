"""Plain backpropagation: over one call, and over chunks in one graph, with which `verify` compares the sweep.

The latter slices, shifts, counts and adds up on its own, so that a fault of the sweep's in these shows as well. It
shares with the sweep the seed of each chunk and where it is cut. The former has nothing of the sweep's around it, so
that its time and memory are what backpropagation takes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.call.arguments import Call, Options
from slimgrad.call.losses import IGNORED, cross_entropy_sum
from slimgrad.call.program import LossFn
from slimgrad.modes import in_mode
from slimgrad.states import raw_tensor
from slimgrad.states.base import State
from slimgrad.sweep import tree
from slimgrad.sweep.random import seeded
from slimgrad.verification.comparison import Gradients, cut, differentiable, fresh, tolerance_of

SEED = 0x51136AD


class Subject(NamedTuple):
    """What is verified: the model or its copy, with what belongs to it."""

    model: nn.Module
    inputs: Any
    targets: Any
    context: Any
    loss_fn: LossFn | None
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    default_dtype: torch.dtype | None = None


class Outcome(NamedTuple):
    """A loss and its gradients."""

    loss: float
    gradients: Gradients


@contextmanager
def as_verified(subject: Subject) -> Generator[None]:
    """Gradients on, the generators put back, and what the copy makes by itself made in the copy's dtype."""
    before = torch.get_default_dtype()
    with seeded(SEED, device_of(subject.model)), torch.enable_grad():
        try:
            torch.set_default_dtype(subject.default_dtype or before)
            yield
        finally:
            torch.set_default_dtype(before)


def plain_backward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    state: Any = None,
    normalizer: float | None = None,
) -> float:
    """Plain backpropagation, to be compared with: one call of the model, its whole graph, gradients added to `.grad`.

    Args:
        model: a causal step.
        inputs: `[batch, time]`.
        targets: like the inputs, -100 where none counts; None: the next input is the target.
        state: to begin with; None: the model's own.
        normalizer: what the summed cross-entropy is divided by; None: the targets that count.

    Returns:
        The loss. Memory is linear in the length: every activation is kept.
    """
    device = device_of(model)
    outputs, _ = model(inputs.to(device), cast(Any, model).initial_state(len(inputs)) if state is None else state)
    if targets is None:
        outputs, targets = outputs[:, :-1], inputs[:, 1:]
    targets = targets.to(device)
    loss = cross_entropy_sum(outputs, targets) / (_count(targets) if normalizer is None else normalizer)
    loss.backward()
    return float(loss.detach())


def in_one_graph(subject: Subject, chunk: int | None) -> Outcome:
    """Plain backpropagation: the states passed on by ordinary autograd, nothing swept."""
    loss, takers = plain_loss(subject, chunk)
    flat = [(kind, name, x) for kind, named in takers.items() for name, x in named.items()]
    found = cast("tuple[Tensor | None, ...]", torch.autograd.grad(loss, [x for _, _, x in flat], allow_unused=True))
    gradients: Gradients = {kind: {} for kind in takers}
    for (kind, name, _), g in zip(flat, found, strict=True):
        if g is not None:
            gradients[kind][name] = g
    return Outcome(float(loss.detach()), gradients)


def plain_loss(subject: Subject, chunk: int | None) -> tuple[Tensor, Gradients]:
    """The loss of chunks in one graph (None: of one call), and the tensors that take gradients, by kind and name."""
    model, loss_fn = subject.model, subject.loss_fn or _cross_entropy
    subject = subject._replace(inputs=fresh(subject.inputs), context=fresh(subject.context))
    takers: Gradients = {
        "parameter": {name: p for name, p in model.named_parameters() if p.requires_grad},
        **{
            kind: {f"{kind} {i}": x for i, x in enumerate(tree.tensors(given)) if x.requires_grad}
            for kind, given in (("input", subject.inputs), ("context", subject.context))
        },
    }
    losses: list[Tensor] = []
    count, states = 0, list[Any]()
    for program, (inputs, targets) in zip(_programs(subject, chunk), sequences(subject), strict=True):
        with program.chunk_context(-1):
            given = cast(Any, model).initial_state(program.batch)
        state = tree.map_leaves(lambda leaf: with_value(leaf, _entry), given)
        states.append(tree.map_leaves(raw_tensor, state))
        for start, stop in program.cut:
            with program.chunk_context(start):
                outputs, state = _step(subject, cut(inputs, start, stop), state)
                loss = loss_fn(outputs, cut(targets, start, stop))
            losses.append(loss["loss"] if isinstance(loss, dict) else loss)
        count += _count(targets)
    named = states if isinstance(subject.inputs, list) else states[0]
    takers["initial state"] = {
        f"initial state {name}": x
        for name, x in zip(tree.paths(named), tree.leaves(named), strict=True)
        if isinstance(x, Tensor) and x.requires_grad and x.numel()
    }
    return torch.stack(losses).sum() / max(count, 1), takers


def _entry(x: Tensor) -> Tensor:
    """A tensor of this leaf's own, so that its gradient counts nothing that another leaf was made of."""
    if not differentiable(x):
        return x
    return x.clone() if x.requires_grad else x.detach().clone().requires_grad_()


def with_value(leaf: Any, function: Any) -> Any:
    """The leaf of a state with `function` applied to its tensor."""
    x = raw_tensor(leaf)
    if x is None or (y := function(x)) is x:
        return leaf
    return leaf.with_value(y) if isinstance(leaf, State) else y


def _programs(subject: Subject, chunk: int | None) -> list[Any]:
    """Where each sequence is cut and what each chunk draws from: all that the references share with the sweep."""
    longest = max(tree.tensors(inputs)[0].shape[1] for inputs, _ in sequences(subject))
    loss_fn = subject.loss_fn or cross_entropy_sum
    options = Options(subject.context, longest if chunk is None else chunk, None, loss_fn, "targets", None, None)
    with seeded(SEED, device_of(subject.model)):
        return list(Call(subject.model, subject.inputs, subject.targets, options).sequences)


def sequences(subject: Subject) -> list[tuple[Any, Any]]:
    """Inputs and targets of each sequence, batched, on the model's device, next tokens shifted into place."""
    device, is_list = device_of(subject.model), isinstance(subject.inputs, list)
    inputs = subject.inputs if is_list else [subject.inputs]
    targets = subject.targets if is_list and subject.targets is not None else [subject.targets] * len(inputs)
    found: list[tuple[Any, Any]] = []
    for one, goal in zip(inputs, targets, strict=True):
        one, goal = (tree.map_tensors(lambda x: (x[None] if x.dim() == 1 else x).to(device), x) for x in (one, goal))
        goal = tree.map_tensors(Tensor.clone, goal)  # loss_fn may write to them
        found.append((one, F.pad(one[:, 1:].long(), (0, 1), value=IGNORED) if goal is None else goal))
    return found


def _step(subject: Subject, inputs: Any, state: Any) -> Any:
    if subject.context is None:
        return subject.model(inputs, state)
    return subject.model(inputs, state, tree.map_leaves(lambda x: x, subject.context))  # containers of its own


def _count(targets: Any) -> int:
    """Targets that are not ignored, counted in a dtype that holds -100."""
    if isinstance(targets, Tensor) and not differentiable(targets):
        return int((targets.long() != IGNORED).sum())
    first = tree.tensors(targets)[0]
    return first.shape[0] * first.shape[1]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    logits = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=IGNORED, reduction="sum")


def loss_that_is_no_sum(subject: Subject, chunk: int) -> list[str]:
    """A sentence if `loss_fn` of one call's outputs is not what it gives for their chunks, added up."""
    if subject.loss_fn is None:
        return []
    whole = parts = torch.zeros(())
    pieces, pairs = 0, list(zip(_programs(subject, chunk), _programs(subject, None), sequences(subject), strict=True))
    for program, uncut, (inputs, targets) in pairs:
        with uncut.chunk_context(-1):
            state = cast(Any, subject.model).initial_state(program.batch)
        with uncut.chunk_context(0):
            outputs, _ = _step(subject, inputs, state)
            if any(x.shape[:2] != (program.batch, program.time) for x in tree.tensors(outputs)):
                return []
            spans = [(0, program.time), *program.cut]
            pieces_of = [tree.map_tensors(Tensor.clone, (cut(outputs, *span), cut(targets, *span))) for span in spans]
            losses = [subject.loss_fn(*piece) for piece in pieces_of]
        first, *rest = (float((loss["loss"] if isinstance(loss, dict) else loss).detach()) for loss in losses)
        whole, parts, pieces = whole + first, parts + sum(rest), pieces + len(rest)
    whole, parts, cuts = float(whole), float(parts), pieces / len(pairs)
    if abs(parts - whole) <= tolerance_of(subject.dtype) * abs(whole):
        return []
    mean = abs(parts - cuts * whole) < 0.3 * cuts * abs(whole) and cuts > 1
    return [
        f"your loss_fn {'looks like a mean' if mean else 'is not a sum'} over the chunk: of the same outputs it gives "
        f"{whole:.4g} in one piece and {parts:.4g} added up over {pieces} chunks. Return the sum over the chunk; "
        "slimgrad divides once, by the number of targets of the whole call"
    ]


def draws_in_eval_mode(subject: Subject) -> list[str]:
    """A sentence if the model, or `loss_fn`, draws random numbers with every module in eval mode."""
    with in_mode(subject.model.modules(), training=False):
        who = draws_anything(subject)
    if not who:
        return []
    return [
        f"{who} draws random numbers in eval mode too, of which one call takes others than chunks do, so that the step "
        "check cannot pass. Let functional noise ask for the mode, as F.dropout(x, p, training=self.training), or "
        "verify without it"
    ]


def draws_anything(subject: Subject) -> str:
    """Who draws random numbers in one call, as it is set: "the model", "loss_fn", or nobody."""
    loss_fn = subject.loss_fn or _cross_entropy
    for program, (inputs, targets) in zip(_programs(subject, None), sequences(subject), strict=True):
        with program.chunk_context(-1):
            state = cast(Any, subject.model).initial_state(program.batch)
        with program.chunk_context(0):
            before = program.draws()
            outputs, _ = _step(subject, inputs, state)
            if program.draws() != before:
                return "the model"
            loss_fn(outputs, targets)
            if program.draws() != before:
                return "loss_fn"
    return ""


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    first = next((x for x in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device
