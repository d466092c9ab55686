"""Can this step be cut, and does its state pass the gradient on? For a function that somebody else wrote.

`verify` needs a model; this needs `step(inputs, state) -> (outputs, next_state)` alone, and no loss. One call over all
of the inputs is compared with several calls that pass the state on:

1. **cut**: outputs and final state are the same.
2. **gradient**: so is the gradient of random numbers times the *later* outputs and the final state, with respect to the
   *first* inputs, the initial state, and what the function holds. In the chunked calls it can come through the state
   alone.

Where these differ, each leaf of the state is looked at: does the next call depend on it, and does a gradient come back?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from slimgrad.errors import InputError
from slimgrad.states.tensors import version
from slimgrad.sweep import tree
from slimgrad.sweep.cut import Cut
from slimgrad.sweep.random import seeded
from slimgrad.verification.comparison import (
    Copier,
    Finding,
    Gradients,
    NarrowCasts,
    cast_along,
    coarsest,
    compare,
    cut,
    differentiable,
    equal,
    fresh,
    held_parameters,
    in_short,
    listed,
    named,
    random_numbers,
    random_product,
    short,
    tolerance_of,
)

Step = Callable[[Any, Any], "tuple[Any, Any]"]

_SEED = 0x57E9


@dataclass(frozen=True)
class StepReport:
    """What `verify_step` found. `print` it, or `assert report.passed`.

    Attributes:
        findings: one per output and leaf of the state ("cut"), one per gradient ("gradient").
        faults: what is wrong, a sentence each.
        tolerance: what every error must stay under.
        setting: what was compared, in words.
        notes: whatever else there is to say, a sentence each.
    """

    findings: tuple[Finding, ...]
    faults: tuple[str, ...]
    tolerance: float
    setting: str
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether a cut is harmless and the state passes its gradient on."""
        return not self.faults and all(f.error <= self.tolerance for f in self.findings)  # NaN fails

    def __str__(self) -> str:
        lines = [f"{'passed' if self.passed else 'FAILED'}: {self.setting}; tolerance {self.tolerance:.0e}"]
        titles = {
            "cut": "outputs and state of several calls against one",
            "gradient": "what comes back through the state",
        }
        for check, title in titles.items():
            found = sorted((f for f in self.findings if f.check == check), key=lambda f: -f.error)
            lines.append(f"  {check} ({title}){'' if found else ': nothing to compare'}")
            lines += [f"    {f.error:8.1e}  {f.name}  (norm {f.norm:.2e})" for f in found[:5]]
            if len(found) > 5:
                lines.append(f"    and {len(found) - 5} more, all smaller")
        lines += [f"  fault: {fault}" for fault in self.faults]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def verify_step(
    step: Step,
    inputs: Any,
    state: Any = None,
    *,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> StepReport:
    """Tell whether a step function may be cut into chunks, and whether its state passes the gradient on.

    Args:
        step: `step(inputs, state) -> (outputs, next_state)`: any function, bound method or module. Modules and tensors
            that it holds (closes over, has as defaults) are cast along in a copy.
        inputs: a tensor or tree of tensors `[batch, time, ...]`; floating inputs show more than tokens do.
        state: the state to start from, a tree of tensors, or None.
        chunk: inputs per call; a third of them by default.
        dtype: the precision of the comparison. A function that does not run in it is compared in its own.

    Returns:
        A `StepReport` that says what is wrong, and with which leaf of the state.

    Raises:
        InputError: inputs or outputs without `[batch, time]`, or too few inputs for two calls.

    Cost: about a dozen calls over the inputs, with their graphs; take a few dozen inputs.

    Example:
        >>> print(sg.verify_step(lambda x, h: gru(x, h), torch.randn(2, 30, 8), torch.zeros(1, 2, 8)))
    """
    time = _time(inputs)
    size = -(-time // 3) if chunk is None else chunk
    if size < 1 or len(Cut(time, size)) < 2:
        raise InputError(f"chunk={chunk}: expected at least two chunks in {time} inputs")
    _require_tensors(state, "the initial state")
    leaves = zip(tree.paths(state), tree.leaves(state), strict=True)
    own_dtypes = {name: leaf.dtype for name, leaf in leaves if isinstance(leaf, Tensor)}
    notes: tuple[str, ...] = ()
    try:
        copied = Copier(dtype).function(step)
        trial = _Trial(
            copied,
            cast_along(inputs, dtype),
            cast_along(state, dtype),
            size,
            dtype=dtype,
            default_dtype=dtype,
            own_dtypes=own_dtypes,
        )
        trial.call(trial.inputs, trial.state)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  whatever somebody else's function raises; in its own dtype it may run
        own = coarsest([*held_parameters(step).values(), *tree.tensors([inputs, state])])
        notes = (f"it does not run in {short(dtype)} ({in_short(error)}): compared in {short(own)}",)
        trial = _Trial(
            step,
            tree.map_tensors(Tensor.detach, inputs),
            tree.map_tensors(Tensor.detach, state),
            size,
            dtype=own,
            default_dtype=torch.get_default_dtype(),
            own_dtypes=own_dtypes,
        )
    return trial.report(notes)


class _Side(NamedTuple):
    """One of the two sides of the comparison: what came out, and the gradients that came back."""

    values: Gradients
    gradients: Gradients
    scale: float


class _Trial:
    """A step with its inputs, and whatever of its conduct is noticed while it is called."""

    def __init__(
        self,
        step: Step,
        inputs: Any,
        state: Any,
        size: int,
        *,
        dtype: torch.dtype,
        default_dtype: torch.dtype,
        own_dtypes: dict[str, torch.dtype],
    ) -> None:
        self.step, self.inputs, self.state, self.size = step, inputs, state, size
        self._dtype, self._default_dtype = dtype, default_dtype
        self._device = tree.tensors(inputs)[0].device
        self._own_dtypes = own_dtypes
        self._written: dict[str, None] = {}
        self._retyped: dict[str, None] = {}
        self._broken: str | None = None
        time = _time(inputs)
        self._spans: list[tuple[int, int]] = [*Cut(time, size)]
        self._setting = f"{getattr(step, '__name__', type(step).__name__)}, {size} of {time} inputs a call"

    def call(self, inputs: Any, state: Any, seed: int = _SEED) -> tuple[Any, Any]:
        """One call, with a copy of the state, so that writing to it harms nobody."""
        given = tree.map_tensors(lambda x: x.clone(), state)
        versions = [(x, version(x)) for x in tree.tensors(given)]
        before = torch.get_default_dtype()
        with seeded(seed, self._device), torch.enable_grad():
            try:
                torch.set_default_dtype(self._default_dtype)
                result = cast(object, self.step(inputs, given))
            finally:
                torch.set_default_dtype(before)
        if not (isinstance(result, tuple) and len(cast("tuple[Any, ...]", result)) == 2):
            raise InputError(
                f"expected step(inputs, state) to return (outputs, next_state), got {type(result).__name__}"
            )
        outputs, following = cast("tuple[Any, Any]", result)
        _require_tensors(following, "the next state")
        names = [name for name, leaf in zip(tree.paths(state), tree.leaves(state), strict=True) if _is_tensor(leaf)]
        self._written.update(dict.fromkeys(n for n, (x, v) in zip(names, versions, strict=True) if version(x) != v))
        for name, leaf in zip(tree.paths(following), tree.leaves(following), strict=True):
            given_as = self._own_dtypes.get(name)
            if isinstance(leaf, Tensor) and given_as is not None and leaf.dtype not in (given_as, self._dtype):
                said = f"leaf {name} was given as {short(given_as)} and comes back as {short(leaf.dtype)}"
                self._retyped[said] = None
        return outputs, following

    def report(self, notes: tuple[str, ...]) -> StepReport:
        """Both sides, compared; then the leaves of the state, where something is wrong or nothing could be compared."""
        conduct = self._conduct()
        with (casts := NarrowCasts()).watching():
            whole = self._side([(0, self._spans[-1][1])])
        chunked = self._side(self._spans)
        dtype = self._dtype
        findings = self._findings(chunked, whole, dtype)
        finer = tolerance_of(dtype)
        if casts.dtype and tolerance_of(casts.dtype) > finer and any(not f.error <= finer for f in findings):
            dtype = casts.dtype
            findings = self._findings(chunked, whole, dtype)
            notes += (f"it computes in {short(dtype)} inside, so it is held to the tolerance of {short(dtype)}",)
        wrong = {f.check for f in findings if not f.error <= tolerance_of(dtype)}
        faults = [*conduct]
        if self._broken:
            faults.append(self._broken)
        elif not conduct and (wrong or not any(f.check == "gradient" for f in findings)):
            faults += self._leaves("cut" in wrong)
        if "cut" in wrong and not faults:
            faults.append(
                "outputs or state depend on where the inputs are cut: look for a memory that is not in the state (a "
                "momentum, a convolution's tail), a position counted from the call's start, a statistic over the call"
            )
        if wrong == {"gradient"} and not faults:
            faults.append("the gradient that comes back through the state is another one than within one call")
        if self._written:
            faults.append(f"it writes to the state it is given, leaf {listed(self._written)}: clone it in your adapter")
        notes += (*self._retyped, *self._beginning())
        first = [f.norm for f in findings if f.name.startswith("input")]
        if first and max(first) <= torch.finfo(dtype).eps * whole.scale:
            notes += ("the later outputs hardly depend on the first inputs: a lost gradient could not have been seen",)
        setting = f"{self._setting}, {short(self._dtype)}"
        return StepReport(tuple(findings), tuple(faults), tolerance_of(dtype), setting, notes)

    def _conduct(self) -> list[str]:
        """What makes any comparison vain."""
        first, second, third = (self.call(self.inputs, self.state, seed) for seed in (_SEED, _SEED, _SEED + 1))
        if not equal(first, second):
            return [
                "two equal calls gave different results: it draws from a generator that is not torch's, keeps "
                "something between calls, or uses a kernel that is not deterministic"
            ]
        if not equal(first, third):
            return ["it draws random numbers, so that calls of other lengths differ: turn dropout off (eval mode)"]
        return []

    def _side(self, spans: list[tuple[int, int]]) -> _Side:
        inputs, state = fresh(self.inputs), fresh(self.state)
        takers: Gradients = {
            "input": named("input", inputs),
            "initial state": named("initial state", state),
            "parameter": held_parameters(self.step),
        }
        pieces: list[dict[str, Tensor]] = []
        for start, stop in spans:
            outputs, state = self.call(cut(inputs, start, stop), state)
            pieces.append(named("outputs", outputs, every=True))
            for name, y in pieces[-1].items():
                if y.dim() < 2 or y.shape[1] != stop - start:
                    raise InputError(
                        f"{name}: expected [batch, time, ...] with time {stop - start}, got {list(y.shape)}. "
                        "Transpose, or leave out, in your adapter"
                    )
        outputs = {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}
        values: Gradients = {"outputs": outputs, "final state": named("final state", state, every=True)}
        later = {name: y[:, self.size :] for name, y in outputs.items()}
        product = random_product([later, values["final state"]])
        flat = [(kind, name, x) for kind, named in takers.items() for name, x in named.items() if x.requires_grad]
        gradients: Gradients = {kind: {} for kind in takers}
        if flat and not product.requires_grad:
            self._broken = "nothing that it returns has a graph: it runs under no_grad, or detaches everything"
        elif flat:
            try:
                found = torch.autograd.grad(product, [x for _, _, x in flat], allow_unused=True)
            except RuntimeError as error:  # what autograd needs was written in place
                self._broken = f"no gradient can be taken of it ({in_short(error)})"
                return _Side(values, gradients, 0.0)
            for (kind, name, _), g in zip(flat, cast("tuple[Tensor | None, ...]", found), strict=True):
                if g is not None and kind == "input":
                    gradients[kind][f"{name}, the first {self.size}"] = g[:, : self.size]
                elif g is not None:
                    gradients[kind][name] = g
        return _Side(values, gradients, float(product.detach().abs()))

    def _findings(self, chunked: _Side, whole: _Side, dtype: torch.dtype) -> list[Finding]:
        rounding = torch.finfo(dtype).eps * whole.scale
        values, _ = compare("cut", chunked.values, whole.values, dtype)
        gradients, _ = compare("gradient", chunked.gradients, whole.gradients, dtype, rounding=rounding)
        return [*values, *gradients]

    def _leaves(self, cut_is_wrong: bool) -> list[str]:
        """For each leaf of the state after the first call: does the second depend on it, does a gradient come back?"""
        (start, stop), (_, end) = self._spans[:2]
        first, second = (cut(self.inputs, *span) for span in ((start, stop), (stop, end)))
        _, state = self.call(fresh(first), fresh(self.state))
        other = self.call(cut(self.inputs, end - stop, end), self.state)[1]
        given = fresh(state)
        leaves, spec = tree.flatten(given)
        results = self.call(second, given)
        product = random_product(results)
        faults: list[str] = []
        unused: list[str] = []
        names = tree.paths(state)
        for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            if not (_is_tensor(leaf) and differentiable(leaf) and leaf.numel()):
                continue
            moved = list(leaves)
            moved[index] = leaf.detach() + 0.1 * random_numbers(leaf) * max(1.0, float(leaf.detach().abs().max()))
            if equal(self.call(second, tree.unflatten(moved, spec)), results):
                unused.append(name)
                continue
            back = (
                torch.autograd.grad(product, leaf, allow_unused=True, retain_graph=True)
                if product.requires_grad
                else ()
            )
            returned, elsewhere = tree.leaves(state)[index], tree.leaves(other)[index : index + 1]
            if not back or back[0] is None:
                faults.append(
                    f"leaf {name}: no gradient comes back through it: the next call detaches what it is given"
                )
            elif not returned.requires_grad and not equal([returned], elsewhere):
                faults.append(f"leaf {name}: no gradient comes back through it: it is detached where it is returned")
        if cut_is_wrong and not tree.tensors(state):
            return ["the state is dropped: the step returns none"]
        if cut_is_wrong and unused and len(unused) == sum(_is_tensor(x) and differentiable(x) for x in leaves):
            return [*faults, "the state is dropped: the second call does not depend on it"]
        if cut_is_wrong and unused:
            faults.append(f"leaf {listed(unused)}: the second call does not depend on it")
        return faults

    def _beginning(self) -> list[str]:
        """A model's `initial_state` must return tensors: what to return where the step begins with None."""
        piece = cut(self.inputs, *self._spans[0])
        outputs, following = self.call(piece, self.state)
        leaves, spec = tree.flatten(self.state)
        found, same_spec = tree.leaves(following), spec == tree.flatten(following)[1]
        began = [
            name
            for name, leaf, after in zip(tree.paths(self.state), leaves, found, strict=False)
            if leaf is None and (isinstance(after, Tensor) or not same_spec)
        ]
        if not began or not tree.tensors(following):
            return []
        zeros: Any = tree.map_tensors(torch.zeros_like, following)
        if same_spec:
            filled = [zero if leaf is None else leaf for leaf, zero in zip(leaves, tree.leaves(zeros), strict=True)]
            zeros = tree.unflatten(filled, spec)
        try:
            same = equal(outputs, self.call(piece, zeros)[0])
        except Exception:  # noqa: BLE001  somebody else's function, given what it did not ask for
            same = False
        return [
            f"leaf {listed(began)} begins as None, and a model's initial_state must return tensors: "
            + ("zeros in the shapes of the next state give the same outputs" if same else "zeros do not do the same")
        ]


def _time(inputs: Any) -> int:
    shapes = {tuple(x.shape[:2]) for x in tree.tensors(inputs)}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
        raise InputError(
            "expected inputs [batch, time, ...], a tensor or a tree of tensors with the same batch and time"
        )
    return shape[1]


def _require_tensors(state: Any, what: str) -> None:
    for name, leaf in zip(tree.paths(state), tree.leaves(state), strict=True):
        if not (leaf is None or isinstance(leaf, Tensor | bool | int | float | str)):
            raise InputError(
                f"{what}, leaf {name}: expected a tree of tensors (dicts, lists, tuples) or None, got a "
                f"{type(leaf).__name__}. Take its tensors out of it and put them back in your adapter"
            )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
