"""What `verify` and `verify_step` share: errors on the scale of their kind, things cast along, narrow casts found."""

from __future__ import annotations

import copy
import textwrap
import types
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad.sweep import tree

# A cut state gradient shows as 1e-2 to 1; agreement in float64 was measured at 1e-13 and below, in float32 at 1e-6.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_NARROW = 5e-2
# A gradient this much smaller than all of its kind together is compared on that scale. A key bias, whose true gradient
# is zero, came out at up to 8e-18 of all parameters' gradients in float64, 4e-9 in float32 and 7e-5 in bfloat16 (widths
# 16 to 128, 200 to 2,000 tokens): over these fractions well below the tolerance, over a millionth in float32 far above.
_SMALL = {torch.float64: 1e-6, torch.float32: 3e-4}
_SMALL_NARROW = 1e-2

_SEED = 0x57E9

Gradients = dict[str, dict[str, Tensor]]
"""By kind ("parameter", "input", ...), then by name."""


@dataclass(frozen=True)
class Finding:
    """How far one result is from its reference.

    Attributes:
        check: which comparison: "sweep" or "step" (`verify`), "cut" or "gradient" (`verify_step`).
        name: the parameter, `input ...`, `context ...`, `initial state ...`, `outputs ...` or `final state ...`.
        error: ||difference|| over ||reference||, or over a small part of ||all references of its kind|| where that is
            larger. NaN and infinities that both have at the same places are no difference.
        norm: ||reference||; NaN where no number of it is finite.
    """

    check: str
    name: str
    error: float
    norm: float


def tolerance_of(dtype: torch.dtype) -> float:
    """What errors must stay under when everything is computed in `dtype`."""
    return _TOLERANCES.get(dtype.to_real(), _TOLERANCE_NARROW)


def compare(
    check: str, got: Gradients, expected: Gradients, dtype: torch.dtype, *, rounding: float = 0.0
) -> tuple[list[Finding], float]:
    """A finding for each name, and the largest over the kinds of ||all differences|| / ||all references||.

    The kinds do not share a scale: the gradient of a state of zeros under a normalisation can be 1e12 times that of
    the parameters, and would hide whatever is wrong with them.

    Args:
        check: goes into the findings.
        got, expected: what is compared; what is missing is zero.
        dtype: what was computed in.
        rounding: a kind whose norm, all together, is below this is zero but for rounding: its differences are measured
            against this much over the tolerance.
    """
    findings: list[Finding] = []
    totals: list[float] = []
    small = _SMALL.get(dtype.to_real(), _SMALL_NARROW)
    for kind in sorted({*got, *expected}):
        ours, theirs = got.get(kind, {}), expected.get(kind, {})
        measured = {name: _distance(ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})}
        finite = [(distance, norm) for distance, norm in measured.values() if norm == norm]
        if not finite:
            findings += [Finding(check, name, 0.0, norm) for name, (_, norm) in measured.items()]
            continue
        total = sum(norm**2 for _, norm in finite) ** 0.5
        floor = max(rounding / tolerance_of(dtype) if total <= rounding else 0.0, 1e-300)
        for name, (distance, norm) in measured.items():
            compared = norm == norm or distance  # zero over nothing: neither held a number
            error = distance / max(norm, small * total, floor) if compared else 0.0
            findings.append(Finding(check, name, error, norm))
        totals.append(sum(distance**2 for distance, _ in finite) ** 0.5 / max(total, floor))
    nothing = float("nan") if findings else 0.0
    return findings, max(totals, default=nothing, key=lambda error: (error != error, error))


def _distance(got: Tensor | None, expected: Tensor | None) -> tuple[float, float]:
    """||got - expected|| and ||expected||, without the places where neither is a number."""
    given = got if expected is None else expected
    assert given is not None
    e = _wide(torch.zeros_like(given) if expected is None else expected)
    g = torch.zeros_like(e) if got is None else _wide(got).to(e.device)
    if g.shape != e.shape:
        return float("inf"), float(torch.linalg.vector_norm(e))
    # an overflow is NaN or infinite by the order of the additions
    alike = ~e.isfinite() & ~g.isfinite() & ((g == e) | g.isnan() | e.isnan())
    if bool(alike.any()):
        if bool(alike.all()):
            return 0.0, float("nan")
        g, e = g[~alike], e[~alike]
    return float(torch.linalg.vector_norm(g - e)), float(torch.linalg.vector_norm(e))


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    x = x.to_dense() if x.layout is not torch.strided else x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def differentiable(x: Tensor) -> bool:
    """Whether a tensor of this dtype can have a gradient."""
    return x.is_floating_point() or x.is_complex()


def cast_tensor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the precision of `dtype`: complex numbers stay complex, integers as they are."""
    if x.is_complex():
        return x.to(dtype.to_complex())
    return x.to(dtype) if x.is_floating_point() else x


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the precision of `dtype` where that is finer than its own."""
    return cast_tensor(x, dtype) if differentiable(x) and _eps(dtype) < _eps(x.dtype) else x


def cast_along(given: Any, dtype: torch.dtype) -> Any:
    """A tree with its floating and complex tensors in the precision of `dtype`, without graphs."""
    return tree.map_tensors(lambda x: cast_tensor(x.detach(), dtype), given)


def fresh(given: Any) -> Any:
    """Leaves of their own, so that each run finds only its own gradients."""
    return tree.map_tensors(lambda x: x.detach().requires_grad_() if differentiable(x) else x, given)


def cut(given: Any, start: int, stop: int) -> Any:
    """A tree's inputs from `start` to `stop`."""
    return tree.map_tensors(lambda x: x[:, start:stop], given)


def coarsest(tensors: list[Tensor]) -> torch.dtype:
    """The coarsest precision among tensors; the default one if none is floating."""
    found = {x.dtype.to_real() for x in tensors if differentiable(x)}
    return max(found, key=_eps, default=torch.get_default_dtype())


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def map_held(
    value: Any, on_module: Callable[[nn.Module], Any], on_tensor: Callable[[Tensor], Any], known: dict[int, Any]
) -> Any:
    """`value` with what it holds replaced; `value` itself where nothing is.

    Looks into containers, partials, bound methods, and functions: what they close over and their defaults. Globals, and
    objects that are no modules, stay as they are. `known` gives what was replaced already, by `id`.
    """

    def go(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, nn.Module):
            return on_module(value)
        if isinstance(value, Tensor):
            return on_tensor(value)
        if isinstance(value, partial):
            held = cast("partial[Any]", value)
            return partial(go(held.func), *go(held.args), **go(held.keywords))
        if isinstance(value, types.MethodType):
            owner = go(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, types.FunctionType):
            known[id(value)] = value  # it may close over itself
            known[id(value)] = function(value)
            return known[id(value)]
        if isinstance(value, dict | list | tuple):
            leaves, spec = tree.flatten(value)
            replaced = [go(leaf) for leaf in leaves]
            if any(a is not b for a, b in zip(leaves, replaced, strict=True)):
                return tree.unflatten(replaced, spec)
        return value

    def function(f: types.FunctionType) -> types.FunctionType:
        before = (f.__defaults__, f.__kwdefaults__, *(f.__closure__ or ()))
        after = (go(f.__defaults__), go(f.__kwdefaults__), *map(cell, f.__closure__ or ()))
        if all(a is b for a, b in zip(before, after, strict=True)):
            return f
        copied = types.FunctionType(f.__code__, f.__globals__, f.__name__, after[0], after[2:])
        copied.__kwdefaults__ = after[1]
        return copied

    def cell(one: types.CellType) -> types.CellType:
        try:
            held = one.cell_contents
        except ValueError:  # not filled yet
            return one
        replaced = go(held)
        return one if replaced is held else types.CellType(replaced)

    return go(value)


class Copier:
    """Copies of modules, and of functions that hold some, in another precision; what is held twice is copied once.

    So a loss that is a method of the model becomes a method of the model's copy.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._copies: dict[int, Any] = {}

    def module(self, module: nn.Module) -> nn.Module:
        """The module's copy. Raises whatever `copy.deepcopy` raises where the module cannot be copied."""
        copied = copy.deepcopy(module, self._copies)
        cast(Any, copied)._apply(partial(cast_tensor, dtype=self._dtype))  # `.to` would make complex numbers real
        for part in copied.modules():
            for name, value in vars(part).items():
                if isinstance(value, Tensor):  # tables that are no buffers
                    vars(part)[name] = cast_tensor(value, self._dtype)
        copied.zero_grad(set_to_none=True)
        return copied

    def function(self, function: Any) -> Any:
        """The function with copies of what it holds, or itself if it holds nothing."""
        return map_held(function, self.module, self._tensor, self._copies)

    def _tensor(self, x: Tensor) -> Tensor:
        return cast_tensor(x.detach(), self._dtype).requires_grad_(x.requires_grad)


def held_parameters(holder: Any) -> dict[str, Tensor]:
    """Every trainable tensor that a module, or a function with what it closes over, holds."""
    found: dict[str, Tensor] = {}

    def on_module(module: nn.Module) -> nn.Module:
        for name, p in module.named_parameters():
            on_tensor(p, name)
        return module

    def on_tensor(x: Tensor, name: str = "a tensor") -> Tensor:
        if x.requires_grad and all(x is not other for other in found.values()):
            found[name if name not in found else f"{name} ({len(found)})"] = x
        return x

    map_held(holder, on_module, on_tensor, {})
    return found


class NarrowCasts(TorchDispatchMode):
    """Within it, operations whose floating results are coarser than what went in are noted, with their module."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        self.places: list[str] = []
        self._modules: list[str] = []

    @contextmanager
    def watching(self) -> Generator[None]:
        """The mode, and hooks that say which module is running."""
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._modules.append(type(module).__name__)

    def _leave(self, *_: Any) -> None:
        self._modules.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = [x for x in tree.tensors((args, kwargs)) if differentiable(x)]
        made = [x for x in tree.tensors(result) if differentiable(x)]
        if taken and made:
            finest, narrowest = min(_eps(x.dtype) for x in taken), coarsest(made)
            if _eps(narrowest) > finest:
                if self.dtype is None or _eps(narrowest) > _eps(self.dtype):
                    self.dtype = narrowest
                place = self._modules[-1] if self._modules else "outside of any module"
                if place not in self.places:
                    self.places.append(place)
        return result


def short(dtype: torch.dtype) -> str:
    """`float64` rather than `torch.float64`."""
    return str(dtype).removeprefix("torch.")


def in_short(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 100, placeholder=' ...')}"


def named(kind: str, given: Any, *, every: bool = False) -> dict[str, Tensor]:
    """The tensors of a tree by name: all, or those that take gradients."""
    found = zip(tree.paths(given), tree.leaves(given), strict=True)
    whole = "" if isinstance(given, Tensor) else None
    return {
        f"{kind} {name if whole is None else whole}".strip(): x
        for name, x in found
        if isinstance(x, Tensor) and x.numel() and (every or x.requires_grad)
    }


def listed(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    first, rest = (few := list(names))[:4], len(few) - 4
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, apart from the sign of zero."""
    a, b = tree.tensors(one), tree.tensors(other)
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(((x == y) | ((x != x) & (y != y))).all())
        for x, y in zip(a, b, strict=True)
    )


def random_product(given: Any) -> Tensor:
    """The inner product of every floating tensor with random numbers, the same at each call."""
    total = torch.zeros(())
    for index, x in enumerate(tree.tensors(given)):
        if differentiable(x):
            product = (random_numbers(x, index).conj() * x).sum()
            total = total.to(product.device) + (product.real if product.is_complex() else product)
    return total


def random_numbers(like: Tensor, index: int = 0) -> Tensor:
    """Random numbers that leave the generators alone."""
    generator = torch.Generator().manual_seed(_SEED + index)
    wide = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, dtype=wide, generator=generator).to(like.device, like.dtype)
