"""Is it really exact? Chunked gradients against two references, for any model, in float64 by default.

1. **sweep**: the same chunks in one graph. Differs from the sweep only in the sweep itself: states rolled back, kept or
   recomputed, adjoints carried by hand, gradients gathered. Random draws included, since each chunk has its own seed.
2. **step**: one call over the whole sequence; in eval mode if anything is drawn at random in training. Differs in the
   model: a step whose outputs depend on where the sequence was cut fails here. What a model that draws does in training
   mode alone is not seen.

The references slice, shift, count and add up on their own, so that a fault of the sweep's in these shows as well. They
share with it the seed of each chunk and where it is cut.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.api import backward
from slimgrad.call.additive import compared_anyway
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.call.program import LossFn
from slimgrad.call.protocol import require_causal_model
from slimgrad.call.source import Reader
from slimgrad.errors import InputError
from slimgrad.modes import in_mode
from slimgrad.sweep import tree
from slimgrad.sweep.cut import Cut
from slimgrad.sweep.random import seeded
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.verification.comparison import (
    Copier,
    Finding,
    Gradients,
    NarrowCasts,
    cast_along,
    coarsest,
    compare,
    fresh,
    in_short,
    listed,
    short,
    tolerance_of,
    widened,
)
from slimgrad.verification.reference import (
    SEED,
    Outcome,
    Subject,
    as_verified,
    device_of,
    draws_anything,
    draws_in_eval_mode,
    in_one_graph,
    loss_that_is_no_sum,
    plain_loss,
    with_value,
)

MOST = 64  # tokens per chunk, where none are asked for
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
        was_cut: whether any sequence had more than one chunk: otherwise one call was compared with itself.
    """

    findings: tuple[Finding, ...]
    global_errors: dict[str, float]
    loss_errors: dict[str, float]
    tolerance: float
    setting: str
    notes: tuple[str, ...] = ()
    was_cut: bool = True

    @property
    def passed(self) -> bool:
        """Whether every gradient and loss is within the tolerance, in both checks, of a sequence that was cut."""
        return self.was_cut and self.agrees

    @property
    def agrees(self) -> bool:
        """Whether they are within the tolerance, whatever was compared."""
        errors = [f.error for f in self.findings] + [*self.global_errors.values(), *self.loss_errors.values()]
        return all(error <= self.tolerance for error in errors)  # NaN fails

    @property
    def worst(self) -> Finding | None:
        """The finding that is farthest off."""
        return max(self.findings, key=_farthest, default=None)

    def __str__(self) -> str:
        verdict = "exact" if self.passed else "NOTHING WAS CUT" if self.agrees else "NOT EXACT"
        lines = [f"{verdict}: {self.setting}; tolerance {self.tolerance:.0e}"]
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
    chunk: int | None = None,
    schedule: Schedule | None = None,
    loss_fn: LossFn | None = None,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Compare the gradients of parameters, floating inputs, context and initial state with plain backpropagation's.

    Works on a copy of the model in `dtype`, with inputs, targets, context and the tensors that `loss_fn` holds cast
    along. A model that cannot be copied, or whose copy does not run in `dtype`, is verified in place and in its own
    dtype, and the report says so. Either way the model, its gradients and the random state are as before afterwards.

    Args:
        model, inputs, targets, context, schedule, loss_fn: as in `slimgrad.backward`.
        chunk: tokens per chunk. None: at most 64, such that the longest sequence has three chunks or more, the last one
            shorter where that can be. A report on a single chunk does not pass: nothing was cut.
        dtype: the precision of the comparison. A model that casts to float32 inside is held to float32's tolerance.

    Returns:
        A `Report` that says which check failed, where, by how much.

    Raises:
        InputError: inputs or targets are a reader.
        Whatever `slimgrad.backward` raises for this model: what it refuses cannot be compared.

    Cost: up to five gradients, two of them plain: memory linear in the sequence. Take one of a few chunks.
    """
    if any(isinstance(x, Reader) for x in (inputs, targets)):
        raise InputError(
            "verify compares with plain backpropagation, which needs the whole sequence: expected tensors, got a "
            "reader. Pass what it reads of a few chunks: verify(model, reader.read(0, 500))"
        )
    require_causal_model(model)
    chunk = chosen_chunk(_longest(inputs)) if chunk is None else chunk
    replaced = [
        f"{type(module).__name__}.{name}"
        for module in model.modules()
        for name in ("forward", "advance", "initial_state", "_compiled_call_impl")
        if vars(module).get(name) is not None
    ]
    if replaced:
        reason = f"{', '.join(replaced)} was set on the instance, and a copy would run without it"
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
        subject = Subject(model, inputs, targets, context, loss_fn, own, (note,))
        return _judged(subject, _measure(subject, chunk, schedule), chunk)


_Measured = dict[str, tuple[Outcome, Outcome]]  # by check: chunked, reference


def _copied(
    model: nn.Module, inputs: Any, targets: Any, context: Any, loss_fn: LossFn | None, dtype: torch.dtype
) -> Subject:
    copier = Copier(dtype)
    copied = copier.module(model)
    made = cast(Any, copied).initial_state if hasattr(copied, "initial_state") else None
    if made is not None:

        def initial_state(batch_size: int) -> Any:
            return tree.map_leaves(partial(with_value, function=partial(widened, dtype=dtype)), made(batch_size))

        cast(Any, copied).initial_state = initial_state
    inputs, targets, context = (cast_along(x, dtype) for x in (inputs, targets, context))
    return Subject(copied, inputs, targets, context, copier.function(loss_fn), dtype, default_dtype=dtype)


def _measure(subject: Subject, chunk: int, schedule: Schedule | None) -> _Measured:
    with as_verified(subject):
        in_chunks = _swept(subject, chunk, schedule)
        plain = in_one_graph(subject, chunk)
        if not draws_anything(subject):
            return {"sweep": (in_chunks, plain), "step": (in_chunks, in_one_graph(subject, None))}
        with in_mode(subject.model.modules(), training=False):
            still, whole = _swept(subject, chunk, schedule), in_one_graph(subject, None)
    return {"sweep": (in_chunks, plain), "step": (still, whole)}


def _judged(subject: Subject, measured: _Measured, chunk: int) -> Report:
    """The report, at the tolerance of the coarsest precision that shows in the errors and is found in the model."""
    notes, dtype = list(subject.notes), subject.dtype
    report = _report(subject, measured, chunk, dtype, notes)
    if report.passed:
        return report
    casts = NarrowCasts()
    try:
        with as_verified(subject), casts.watching():  # with gradients: the model may ask for some itself
            plain_loss(subject, chunk)
        with as_verified(subject):
            found = draws_in_eval_mode(subject)
            if not found and report.loss_errors["step"] > report.tolerance:
                found = loss_that_is_no_sum(subject, chunk)
    except Exception as error:  # noqa: BLE001  whatever somebody else's model raises of one run more: the report stands
        found = [f"why was not looked for, as one run more did not go through ({in_short(error)})"]
    if casts.dtype is not None and tolerance_of(casts.dtype) > report.tolerance:
        dtype = casts.dtype
        notes.append(
            f"the model computes in {short(dtype)} inside ({listed(casts.places)}), so it is held to the "
            f"tolerance of {short(dtype)}"
        )
    if not _report(subject, measured, chunk, dtype, []).agrees:
        notes += found
    if any(outcome.loss != outcome.loss for pair in measured.values() for outcome in pair):
        notes.append("the loss is NaN, so there is nothing to compare")
    return _report(subject, measured, chunk, dtype, notes)


def _report(subject: Subject, measured: _Measured, chunk: int, dtype: torch.dtype, notes: list[str]) -> Report:
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
        notes = [*notes, f"nothing but NaN and infinities in both gradients of {listed(empty)}: not compared"]
    time = _longest(subject.inputs)
    was_cut = len(Cut(time, chunk)) > 1
    if not was_cut:
        instead = "a longer sequence" if time < 2 else f"a longer sequence, or chunk={chosen_chunk(time)}"
        said = "nothing was cut, so that nothing is known of chunks: one call was compared with itself. Pass "
        notes = [*notes, said + instead]
    of = f"chunks of {chunk} in {time} tokens" if was_cut else f"{time} token{'s' * (time > 1)} in one chunk"
    setting = f"{type(subject.model).__name__}, {of}, {short(subject.dtype)}"
    return Report(tuple(findings), global_errors, loss_errors, tolerance_of(dtype), setting, tuple(notes), was_cut)


def chosen_chunk(time: int, most: int = MOST) -> int:
    """The largest chunk, of at most `most` tokens, that leaves three or more; the last one shorter, if that can be."""
    cut = [size for size in range(min(most, time), 0, -1) if len(Cut(time, size)) >= 3]
    return next((size for size in cut if time % size), cut[0] if cut else 1)


def _longest(inputs: Any) -> int:
    """Tokens of the longest sequence; what is no tensor is refused later, by name."""
    firsts = [x[0] for one in (inputs if isinstance(inputs, list) else [inputs]) if (x := tree.tensors(one))]
    return max((x.shape[min(x.dim() - 1, 1)] for x in firsts if x.dim()), default=1)


def _swept(subject: Subject, chunk: int, schedule: Schedule | None) -> Outcome:
    """The sweep's loss and gradients; takes the gradients off the model."""
    model, inputs, context = subject.model, fresh(subject.inputs), fresh(subject.context)
    with seeded(SEED, device_of(model)):
        result = backward(
            model,
            inputs,
            tree.map_tensors(Tensor.clone, subject.targets),  # loss_fn may write to them
            context=context,
            chunk=chunk,
            schedule=schedule,
            loss_fn=_measured_not_refused(subject.loss_fn) if subject.loss_fn else cross_entropy_sum,
            final_states=True,
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
    return Outcome(float(result.loss), gradients)


def _measured_not_refused(loss_fn: LossFn) -> LossFn:
    """A loss that is no sum, which `backward` refuses, is compared here, and named in a note."""

    def once(outputs: Any, targets: Any) -> Any:
        return loss_fn(outputs, targets)

    return compared_anyway(once)


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
