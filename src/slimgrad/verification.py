"""Is it really exact? Chunked gradients against two references, for any model, in float64 by default.

1. **sweep**: the same chunks in one graph. Differs from the sweep only in the sweep itself: states rolled back, kept or
   recomputed, adjoints carried by hand, gradients gathered. Random draws included, since each chunk has its own seed.
2. **step**: one call over the whole sequence, in eval mode (no random draws). Differs in the model: a step whose
   outputs depend on where the sequence was cut fails here.

The references slice, shift, count and add up on their own, so that a fault of the sweep's in these shows as well. They
share with it the seed of each chunk and where it is cut.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.api import backward
from slimgrad.call import Call, Options, raw_tensor
from slimgrad.chunks import LossFn
from slimgrad.comparison import (
    Copier,
    Finding,
    Gradients,
    NarrowCasts,
    cast_along,
    coarsest,
    compare,
    differentiable,
    fresh,
    in_short,
    short,
    tolerance_of,
    widened,
)
from slimgrad.losses import IGNORED, cross_entropy_sum
from slimgrad.sweep import tree
from slimgrad.sweep.random import seeded
from slimgrad.sweep.schedule import Schedule
from slimgrad.sweep.state import Growing, PrefixSum

_SEED = 0x51136AD
_TITLES = {"sweep": "against the same chunks in one graph", "step": "against one call over the whole sequence"}


@dataclass(frozen=True)
class Report:
    """What `verify` found. `print` it, or `assert report.passed`.

    Attributes:
        findings: one per gradient and check.
        global_errors: by check, ||all differences|| / ||all references||, the largest over parameters, inputs, context
            and initial state.
        loss_errors: by check, the relative difference of the losses.
        tolerance: what every error must stay under.
        setting: what was compared, in words.
        notes: whatever else there is to say, a sentence each.
    """

    findings: tuple[Finding, ...]
    global_errors: dict[str, float]
    loss_errors: dict[str, float]
    tolerance: float
    setting: str
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every gradient and loss is within the tolerance, in both checks."""
        errors = [f.error for f in self.findings] + [*self.global_errors.values(), *self.loss_errors.values()]
        return all(error <= self.tolerance for error in errors)  # NaN fails

    @property
    def worst(self) -> Finding | None:
        """The finding that is farthest off."""
        return max(self.findings, key=_farthest, default=None)

    def __str__(self) -> str:
        lines = [f"{'exact' if self.passed else 'NOT EXACT'}: {self.setting}; tolerance {self.tolerance:.0e}"]
        for check, title in _TITLES.items():
            everything, loss = self.global_errors[check], self.loss_errors[check]
            lines.append(f"  {check} ({title}): all gradients {everything:.1e}, loss {loss:.1e}")
            found = sorted((f for f in self.findings if f.check == check), key=_farthest, reverse=True)
            lines += [f"    {f.error:8.1e}  {f.name}  (norm {f.norm:.2e})" for f in found[:5]]
            if len(found) > 5:
                lines.append(f"    and {len(found) - 5} more, all smaller")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _farthest(finding: Finding) -> tuple[bool, float]:
    return finding.error != finding.error, finding.error


def verify(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    context: Any = None,
    chunk: int = 64,
    schedule: Schedule | None = None,
    loss_fn: LossFn | None = None,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Compare the chunked gradient of every parameter, floating input and initial state with plain backpropagation.

    Works on a copy of the model in `dtype`, with inputs, targets, context and the tensors that `loss_fn` holds cast
    along. A model that cannot be copied, or whose copy does not run in `dtype`, is verified in place and in its own
    dtype, and the report says so. Either way the model, its gradients and the random state are as before afterwards.

    Args:
        model, inputs, targets, context, chunk, schedule, loss_fn: as in `slimgrad.backward`.
        dtype: the precision of the comparison. A model that casts to float32 inside is held to float32's tolerance.

    Returns:
        A `Report` that says which check failed, where, by how much.

    Raises:
        Whatever `slimgrad.backward` raises for this model: what it refuses cannot be compared.

    Cost: up to five gradients, two of them plain: memory linear in the sequence. Take one of a few chunks.
    """
    replaced = [
        f"{type(module).__name__}.{name}"
        for module in model.modules()
        for name in ("forward", "advance", "initial_state")
        if name in vars(module)
    ]
    if replaced:
        reason = f"{', '.join(replaced)} was replaced on the instance, and a copy would run the original"
    else:
        try:
            subject = _copied(model, inputs, targets, context, loss_fn, dtype)
            measured = _measure(subject, chunk, schedule)
        except Exception as error:  # noqa: BLE001  whatever somebody else's model raises; in place it may run
            reason = f"a copy in {short(dtype)} did not run ({in_short(error)})"
        else:
            return _judged(subject, measured, chunk)
    with _put_back(model):
        own = coarsest(list(model.parameters()) or [*model.buffers(), *tree.tensors(inputs)])
        note = f"{reason}: verified in place, in the model's own {short(own)}"
        subject = _Subject(model, inputs, targets, context, loss_fn, own, (note,))
        return _judged(subject, _measure(subject, chunk, schedule), chunk)


class _Subject(NamedTuple):
    """What is verified: the model or its copy, with what belongs to it."""

    model: nn.Module
    inputs: Any
    targets: Any
    context: Any
    loss_fn: LossFn | None
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    default_dtype: torch.dtype | None = None


class _Outcome(NamedTuple):
    loss: float
    gradients: Gradients


_Measured = dict[str, tuple[_Outcome, _Outcome]]  # by check: chunked, reference


def _copied(
    model: nn.Module, inputs: Any, targets: Any, context: Any, loss_fn: LossFn | None, dtype: torch.dtype
) -> _Subject:
    copier = Copier(dtype)
    copied = copier.module(model)
    made = cast(Any, copied).initial_state if hasattr(copied, "initial_state") else None
    if made is not None:

        def initial_state(batch_size: int) -> Any:
            return tree.map_leaves(partial(_with_value, function=partial(widened, dtype=dtype)), made(batch_size))

        cast(Any, copied).initial_state = initial_state
    inputs, targets, context = (cast_along(x, dtype) for x in (inputs, targets, context))
    return _Subject(copied, inputs, targets, context, copier.function(loss_fn), dtype, default_dtype=dtype)


def _measure(subject: _Subject, chunk: int, schedule: Schedule | None) -> _Measured:
    modes = [(module, module.training) for module in subject.model.modules()]
    with _as_verified(subject):
        in_chunks = _swept(subject, chunk, schedule)
        in_one_graph = _in_one_graph(subject, chunk)
        still = in_chunks
        try:
            if any(training for _, training in modes):
                subject.model.eval()
                still = _swept(subject, chunk, schedule)
            whole = _in_one_graph(subject, None)
        finally:
            for module, training in modes:
                module.training = training
    return {"sweep": (in_chunks, in_one_graph), "step": (still, whole)}


def _judged(subject: _Subject, measured: _Measured, chunk: int) -> Report:
    """The report, at the tolerance of the coarsest precision that shows in the errors and is found in the model."""
    notes, dtype = list(subject.notes), subject.dtype
    report = _report(subject, measured, chunk, dtype, notes)
    if report.passed:
        return report
    with _as_verified(subject), (casts := NarrowCasts()).watching(), torch.no_grad():
        _plain_loss(subject, chunk)
    if casts.dtype is not None and tolerance_of(casts.dtype) > report.tolerance:
        dtype = casts.dtype
        notes.append(
            f"the model computes in {short(dtype)} inside ({', '.join(casts.places[:4])}), so it is held to the "
            f"tolerance of {short(dtype)}"
        )
    with _as_verified(subject), torch.no_grad():
        if report.loss_errors["step"] > tolerance_of(dtype):
            notes += _loss_that_is_no_sum(subject, chunk)
    if any(outcome.loss != outcome.loss for pair in measured.values() for outcome in pair):
        notes.append("the loss is NaN, so there is nothing to compare")
    return _report(subject, measured, chunk, dtype, notes)


def _report(subject: _Subject, measured: _Measured, chunk: int, dtype: torch.dtype, notes: list[str]) -> Report:
    findings: list[Finding] = []
    global_errors: dict[str, float] = {}
    loss_errors: dict[str, float] = {}
    for check, (got, expected) in measured.items():
        # one rounding of the loss: gradients this small are zero
        rounding = torch.finfo(dtype).eps * abs(expected.loss)
        found, global_errors[check] = compare(check, got.gradients, expected.gradients, dtype, rounding=rounding)
        findings += found
        loss_errors[check] = abs(got.loss - expected.loss) / max(abs(expected.loss), 1e-300)
    empty = [f.name for f in findings if f.check == "sweep" and f.norm != f.norm]
    if empty:
        notes = [*notes, f"nothing but NaN and infinities in both gradients of {', '.join(empty[:4])}: not compared"]
    time = max(next(iter(tree.tensors(one))).shape[1] for one, _ in _sequences(subject))
    setting = f"{type(subject.model).__name__}, chunks of {chunk} in {time} tokens, {short(subject.dtype)}"
    return Report(tuple(findings), global_errors, loss_errors, tolerance_of(dtype), setting, tuple(notes))


def _swept(subject: _Subject, chunk: int, schedule: Schedule | None) -> _Outcome:
    """The sweep's loss and gradients; takes the gradients off the model."""
    model, inputs, context = subject.model, fresh(subject.inputs), fresh(subject.context)
    with seeded(_SEED, _device(model)):
        result = backward(
            model,
            inputs,
            subject.targets,
            context=context,
            chunk=chunk,
            schedule=schedule,
            loss_fn=subject.loss_fn or cross_entropy_sum,
        )
    gradients: Gradients = {"parameter": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    for p in model.parameters():
        p.grad = None
    for kind, given in (("input", inputs), ("context", context)):
        gradients[kind] = {f"{kind} {i}": x.grad for i, x in enumerate(tree.tensors(given)) if x.grad is not None}
    names, leaves = tree.paths(result.initial_state_grad), tree.leaves(result.initial_state_grad)
    gradients["initial state"] = {
        f"initial state {name}": g for name, g in zip(names, leaves, strict=True) if isinstance(g, Tensor) and g.numel()
    }
    return _Outcome(float(result.loss), gradients)


def _in_one_graph(subject: _Subject, chunk: int | None) -> _Outcome:
    """Plain backpropagation: the states passed on by ordinary autograd, nothing swept."""
    loss, takers = _plain_loss(subject, chunk)
    flat = [(kind, name, x) for kind, named in takers.items() for name, x in named.items()]
    found = cast("tuple[Tensor | None, ...]", torch.autograd.grad(loss, [x for _, _, x in flat], allow_unused=True))
    gradients: Gradients = {kind: {} for kind in takers}
    for (kind, name, _), g in zip(flat, found, strict=True):
        if g is not None:
            gradients[kind][name] = g
    return _Outcome(float(loss.detach()), gradients)


def _plain_loss(subject: _Subject, chunk: int | None) -> tuple[Tensor, Gradients]:
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
    for program, (inputs, targets) in zip(_programs(subject, chunk), _sequences(subject), strict=True):
        with program.chunk_context(-1):
            given = cast(Any, model).initial_state(program.batch)
        state = tree.map_leaves(lambda leaf: _with_value(leaf, _entry), given)
        states.append(tree.map_leaves(raw_tensor, state))
        for number in range(program.num_chunks):
            start, stop = program.span(number)
            with program.chunk_context(number):
                outputs, state = _step(subject, _cut(inputs, start, stop), state)
                loss = loss_fn(outputs, _cut(targets, start, stop))
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


def _with_value(leaf: Any, function: Any) -> Any:
    """The leaf of a state with `function` applied to its tensor."""
    x = raw_tensor(leaf)
    if x is None or (y := function(x)) is x:
        return leaf
    return type(leaf)(y) if isinstance(leaf, PrefixSum | Growing) else y


def _programs(subject: _Subject, chunk: int | None) -> list[Any]:
    """Where each sequence is cut and what each chunk draws from: all that the references share with the sweep."""
    longest = max(tree.tensors(inputs)[0].shape[1] for inputs, _ in _sequences(subject))
    loss_fn = subject.loss_fn or cross_entropy_sum
    options = Options(subject.context, longest if chunk is None else chunk, None, loss_fn, "targets", None, None)
    with seeded(_SEED, _device(subject.model)):
        return list(Call(subject.model, subject.inputs, subject.targets, options).sequences)


def _sequences(subject: _Subject) -> list[tuple[Any, Any]]:
    """Inputs and targets of each sequence, batched, on the model's device, next tokens shifted into place."""
    device, is_list = _device(subject.model), isinstance(subject.inputs, list)
    inputs = subject.inputs if is_list else [subject.inputs]
    targets = subject.targets if is_list and subject.targets is not None else [subject.targets] * len(inputs)
    found: list[tuple[Any, Any]] = []
    for one, goal in zip(inputs, targets, strict=True):
        one, goal = (tree.map_tensors(lambda x: (x[None] if x.dim() == 1 else x).to(device), x) for x in (one, goal))
        found.append((one, F.pad(one[:, 1:].long(), (0, 1), value=IGNORED) if goal is None else goal))
    return found


def _step(subject: _Subject, inputs: Any, state: Any) -> Any:
    return subject.model(inputs, state) if subject.context is None else subject.model(inputs, state, subject.context)


def _cut(given: Any, start: int, stop: int) -> Any:
    return tree.map_tensors(lambda x: x[:, start:stop], given)


def _count(targets: Any) -> int:
    """Targets that are not ignored, counted in a dtype that holds -100."""
    if isinstance(targets, Tensor) and not differentiable(targets):
        return int((targets.long() != IGNORED).sum())
    first = tree.tensors(targets)[0]
    return first.shape[0] * first.shape[1]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    logits = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=IGNORED, reduction="sum")


def _loss_that_is_no_sum(subject: _Subject, chunk: int) -> list[str]:
    """A sentence if `loss_fn` of one call's outputs is not what it gives for their chunks, added up."""
    if subject.loss_fn is None:
        return []
    whole = parts = torch.zeros(())
    pieces, pairs = 0, list(zip(_programs(subject, chunk), _programs(subject, None), _sequences(subject), strict=True))
    for program, uncut, (inputs, targets) in pairs:
        with uncut.chunk_context(-1):
            state = cast(Any, subject.model).initial_state(program.batch)
        with uncut.chunk_context(0):
            outputs, _ = _step(subject, inputs, state)
            if any(x.shape[:2] != (program.batch, program.time) for x in tree.tensors(outputs)):
                return []
            spans = [(0, program.time), *(program.span(number) for number in range(program.num_chunks))]
            losses = [subject.loss_fn(_cut(outputs, *span), _cut(targets, *span)) for span in spans]
        first, *rest = (float(loss["loss"] if isinstance(loss, dict) else loss) for loss in losses)
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


def _device(model: nn.Module) -> torch.device:
    first = next((x for x in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _as_verified(subject: _Subject) -> Generator[None]:
    """Gradients on, the generators put back, and what the copy makes by itself made in the copy's dtype."""
    before = torch.get_default_dtype()
    with seeded(_SEED, _device(subject.model)), torch.enable_grad():
        try:
            torch.set_default_dtype(subject.default_dtype or before)
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def _put_back(model: nn.Module) -> Generator[None]:
    """Afterwards the model is as it was: attributes, modes, parameters, buffers and every `.grad`."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    registered = [
        (table, dict(table))
        for module in model.modules()
        for table in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers))  # pyright: ignore[reportPrivateUsage]
    ]
    tensors = {id(x): x for _, before in registered for x in before.values() if x is not None}.values()
    values = [(x, x.detach().clone()) for x in tensors]
    given = [(p, p.grad) for p in model.parameters()]
    for p, _ in given:
        p.grad = None
    # such a hook may be an optimiser; PyTorch keeps the table itself, so it is emptied and not replaced
    hooks = [(table, dict(table)) for p in model.parameters() if (table := cast(Any, p)._post_accumulate_grad_hooks)]
    for table, _ in hooks:
        table.clear()
    try:
        yield
    finally:
        for table, before in (*attributes, *registered, *hooks):
            table.clear()
            table.update(before)
        with torch.no_grad():
            for x, value in values:
                if not torch.equal(x, value):
                    x.copy_(value)
        for p, gradient in given:
            p.grad = gradient
