"""Is it really exact? Chunked gradients against two references, for any model, in float64 by default.

1. **sweep**: the same chunks in one graph. Differs from the sweep only in the sweep itself: states rolled back, kept or
   recomputed, adjoints carried by hand, gradients gathered. Random draws included, since each chunk has its own seed.
2. **step**: one call over the whole sequence, in eval mode (no random draws). Differs in the model: a step whose
   outputs depend on where the sequence was cut fails here.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.api import backward
from slimgrad.call import Call, Options, raw_tensor
from slimgrad.chunks import LossFn, batch_and_time
from slimgrad.losses import cross_entropy_sum
from slimgrad.sweep import tree
from slimgrad.sweep.random import seeded
from slimgrad.sweep.schedule import Schedule

# A cut state gradient shows as 1e-2 to 1; agreement in float64 was measured at 1e-13 and below, in float32 at 1e-6.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_NARROW = 5e-2
_SMALL = 1e-6  # a gradient this much smaller than all together is compared on that scale
_SEED = 0x51136AD


@dataclass(frozen=True)
class Finding:
    """How far one gradient is from its reference.

    Attributes:
        check: "sweep" or "step".
        name: the parameter, `input ...` or `initial state ...`.
        error: ||difference|| / max(||reference||, 1e-6 ||all references||).
        norm: ||reference||.
    """

    check: str
    name: str
    error: float
    norm: float


@dataclass(frozen=True)
class Report:
    """What `verify` found. `print` it, or `assert report.passed`.

    Attributes:
        findings: one per gradient and check.
        global_errors: by check, ||all differences|| / ||all references||.
        loss_errors: by check, the relative difference of the losses.
        tolerance: what every error must stay under.
        setting: what was compared, in words.
    """

    findings: tuple[Finding, ...]
    global_errors: dict[str, float]
    loss_errors: dict[str, float]
    tolerance: float
    setting: str

    @property
    def passed(self) -> bool:
        """Whether every gradient and loss is within the tolerance, in both checks."""
        errors = [f.error for f in self.findings] + [*self.global_errors.values(), *self.loss_errors.values()]
        return all(error <= self.tolerance for error in errors)  # NaN fails

    @property
    def worst(self) -> Finding | None:
        """The finding that is farthest off."""
        return max(self.findings, key=lambda f: (f.error != f.error, f.error), default=None)

    def __str__(self) -> str:
        lines = [f"{'exact' if self.passed else 'NOT EXACT'}: {self.setting}; tolerance {self.tolerance:.0e}"]
        titles = {"sweep": "against the same chunks in one graph", "step": "against one call over the whole sequence"}
        for check, title in titles.items():
            everything, loss = self.global_errors[check], self.loss_errors[check]
            lines.append(f"  {check} ({title}): all gradients {everything:.1e}, loss {loss:.1e}")
            found = sorted((f for f in self.findings if f.check == check), key=lambda f: -f.error)
            lines += [f"    {f.error:8.1e}  {f.name}  (norm {f.norm:.2e})" for f in found[:5]]
            if len(found) > 5:
                lines.append(f"    and {len(found) - 5} more, all smaller")
        return "\n".join(lines)


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

    Works on a copy of the model in `dtype`; the model itself, its gradients and the random state are untouched.

    Args:
        model, inputs, targets, context, chunk, schedule, loss_fn: as in `slimgrad.backward`.
        dtype: the precision of the comparison. A model that casts to float32 inside stops agreeing at about 1e-7.

    Returns:
        A `Report` that says which check failed, where, by how much.

    Cost: up to five gradients, two of them plain: memory linear in the sequence. Take one of a few chunks.
    """
    inputs, context = _cast(inputs, dtype), _cast(context, dtype)
    options = Options(context, chunk, schedule, loss_fn or cross_entropy_sum, "targets", None, None)
    exact_copy = _copy(model, dtype)
    with _seeded_like(model):
        in_chunks = _swept(exact_copy, inputs, targets, options)
        in_one_graph = _in_one_graph(exact_copy, inputs, targets, options)
        still, whole = in_chunks, in_one_graph
        if model.training:
            exact_copy.eval()
            still = _swept(exact_copy, inputs, targets, options)
        time = max(batch_and_time(one)[1] for one in (inputs if isinstance(inputs, list) else [inputs]))
        whole = _in_one_graph(exact_copy, inputs, targets, options._replace(chunk=time))
    findings: list[Finding] = []
    global_errors: dict[str, float] = {}
    loss_errors: dict[str, float] = {}
    for check, (got, expected) in {"sweep": (in_chunks, in_one_graph), "step": (still, whole)}.items():
        found, global_errors[check] = _compare(check, got[1], expected[1])
        findings += found
        loss_errors[check] = abs(got[0] - expected[0]) / max(abs(expected[0]), 1e-300)
    setting = f"{type(model).__name__}, chunks of {chunk} in {time} tokens, {str(dtype).removeprefix('torch.')}"
    tolerance = _TOLERANCES.get(dtype, _TOLERANCE_NARROW)
    return Report(tuple(findings), global_errors, loss_errors, tolerance, setting)


Gradients = dict[str, Tensor]


def _swept(model: nn.Module, inputs: Any, targets: Any, options: Options) -> tuple[float, Gradients]:
    with _seeded_like(model):
        inputs, context = _fresh(inputs), _fresh(options.context)
        result = backward(
            model, inputs, targets, context=context, chunk=options.chunk, schedule=options.schedule,
            loss_fn=options.loss_fn,
        )  # fmt: skip
        return float(result.loss), _collect(model, inputs, context, result.initial_state_grad)


def _in_one_graph(model: nn.Module, inputs: Any, targets: Any, options: Options) -> tuple[float, Gradients]:
    """Plain backpropagation: the states handed on by ordinary autograd, nothing swept."""
    with _seeded_like(model):
        inputs, context = _fresh(inputs), _fresh(options.context)
        call = Call(model, inputs, targets, options._replace(context=context))
        losses: list[Tensor] = []
        initial_states: list[Any] = []
        for program in call.sequences:
            with program.chunk_context(-1):
                state = cast(Any, model).initial_state(program.batch)
            initial_states.append(state)
            for x in map(raw_tensor, tree.leaves(state)):
                if x is not None and x.is_floating_point():
                    (x.retain_grad if x.requires_grad else x.requires_grad_)()
            for chunk in range(program.num_chunks):
                with program.chunk_context(chunk):
                    result = program.run(chunk, state)
                losses.append(result.loss)
                state = result.state
        loss = torch.stack(losses).sum() * call.loss_grad.to(losses[0].dtype)
        loss.backward()
        gradients = tree.map_leaves(_gradient_of, initial_states)
        return float(loss.detach()), _collect(model, inputs, context, gradients)


def _gradient_of(leaf: Any) -> Tensor | None:
    x = raw_tensor(leaf)
    return None if x is None else x.grad


def _collect(model: nn.Module, inputs: Any, context: Any, state_gradients: Any) -> Gradients:
    """Every gradient by name; takes them off the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for kind, given in (("input", inputs), ("context", context)):
        for index, x in enumerate(tree.tensors(given)):
            if x.grad is not None:
                found[f"{kind} {index}"] = x.grad
    for index, g in enumerate(tree.leaves(state_gradients)):
        if isinstance(g, Tensor) and g.numel():
            found[f"initial state {index}"] = g
    return found


def _compare(check: str, got: Gradients, expected: Gradients) -> tuple[list[Finding], float]:
    names = sorted({*got, *expected})
    zero = torch.zeros(())
    pairs = {name: (got.get(name, zero), expected.get(name, zero)) for name in names}
    differences = {name: float((g.double() - e.double()).norm()) for name, (g, e) in pairs.items()}
    norms = {name: float(e.double().norm()) for name, (_, e) in pairs.items()}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    scale = {name: max(norm, _SMALL * total, 1e-300) for name, norm in norms.items()}
    findings = [Finding(check, name, differences[name] / scale[name], norms[name]) for name in names]
    return findings, sum(d**2 for d in differences.values()) ** 0.5 / max(total, 1e-300)


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    copied = copy.deepcopy(model).to(dtype)
    copied.zero_grad(set_to_none=True)
    return copied


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree.map_tensors(lambda x: x.detach().to(dtype) if x.is_floating_point() else x, inputs)


def _fresh(inputs: Any) -> Any:
    """Leaves of their own, so that each run finds only its own gradients."""
    return tree.map_tensors(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x, inputs)


@contextmanager
def _seeded_like(model: nn.Module) -> Generator[None]:
    first = next(model.parameters(), None)
    with seeded(_SEED, torch.device("cpu") if first is None else first.device), torch.enable_grad():
        yield
