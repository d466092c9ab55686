"""Inputs for the tests of causal linear attention, and a way to run a form with all of its gradients."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from slimgrad.ops.linear_attention import add_states, get_form

NAMES = ["blocked", "iterative", "prefix_sum", "quadratic", "recurrent"]


@dataclass
class Case:
    """q, k, v, the state before, and cotangents of y and of the state after."""

    q: Tensor
    k: Tensor
    v: Tensor
    R: Tensor
    S: Tensor | None
    dy: Tensor
    R_grad: Tensor
    S_grad: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.R, self.S) if x is not None]

    def to(self, dtype: torch.dtype, state_dtype: torch.dtype | None = None) -> "Case":
        wide = state_dtype or dtype
        rows = {n: getattr(self, n).to(dtype) for n in ("q", "k", "v", "dy")}
        states = {
            n: None if getattr(self, n) is None else getattr(self, n).to(wide) for n in ("R", "S", "R_grad", "S_grad")
        }
        return Case(**rows, **states)


def make_case(
    seed: int, B: int, T: int, H: int, M: int, D: int, *, normalize: bool = True, dtype: torch.dtype = torch.float64
) -> Case:
    """Positive features; a state that weighs as much as the chunk itself, so that a cut gradient shows."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64) + 0.1

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    case = Case(
        q=rand(B, T, H, M),
        k=rand(B, T, H, M),
        v=randn(B, T, H, D),
        R=randn(B, H, M, D) * T**0.5,
        S=rand(B, H, M) * T if normalize else None,
        dy=randn(B, T, H, D),
        R_grad=randn(B, H, M, D),
        S_grad=randn(B, H, M) if normalize else None,
    )
    return case.to(dtype)


def run(
    name: str,
    case: Case,
    *,
    block: int | None = None,
    cuts: tuple[int, ...] = (),
    final_state: bool = True,
    autocast: bool = False,
) -> dict[str, Tensor]:
    """Return y, the final state and the gradients of all inputs; ``autocast`` is on in the forward pass alone."""
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs]
    q, k, v, *state = leaves
    form = get_form(name)
    now = (state[0], state[1] if len(state) > 1 else None)
    rows: list[Tensor] = []
    edges = (0, *cuts, q.shape[1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for a, b in pairwise(edges):
            parts = form.block_sums(k[:, a:b], v[:, a:b], block=block, normalize=case.S is not None)
            rows.append(form.attend(q[:, a:b], parts, now))
            now = add_states(now, parts.total)
    y = torch.cat(rows, 1)
    outputs, cotangents = [y], [case.dy]
    if final_state:
        outputs += [x for x in now if x is not None]
        cotangents += [x for x in (case.R_grad, case.S_grad) if x is not None]
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    names = ["dq", "dk", "dv", "dR", "dS"][: len(grads)]
    return {"y": y, "R": now[0], **({} if now[1] is None else {"S": now[1]}), **dict(zip(names, grads, strict=True))}


def error(have: Tensor, want: Tensor) -> float:
    """Relative error in the Frobenius norm, in float64."""
    have, want = have.detach().double(), want.detach().double()
    return ((have - want).norm() / want.norm()).item()
