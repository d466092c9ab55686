"""Causal linear attention token by token: the paper's iterative form.

One state is updated in place from token to token, and the prefix sums are never laid out over time. The backward pass
walks back from the *last* state, which alone is kept, and rebuilds each earlier one by subtraction:

    forward   R_t = R_{t-1} + k_t v_t^T                 u_t = R_t^T q_t
    backward  dq_t = R_t du_t       G_t = G_{t+1} + q_t du_t^T      R_{t-1} = R_t - k_t v_t^T
              dk_t = G_t v_t        dv_t = G_t^T k_t

The normaliser rides along as one more column of v, all ones: R then carries S as its last column, and u the
denominator. The glossary is in `parts`.

Costs: O(T M D) work in T serial steps, a few small operations each: for the paper's experiments, not for speed.
Memory: O(T (M + D)) saved, plus M (D + 1) per head once. The subtraction drifts: in float32 the state that backward
ends with is off by rounding that grows with T, which the blocked form, free of subtraction, does not have.

Forward mode: a jvp rule, three runs of the loop, u being linear in q, in (k, R) and in (v, R).
Source: the paper, section 3, the iterative form; see PAPER_EPS for its denominator.
"""

# pyright: reportConstantRedefinition=false, reportIncompatibleMethodOverride=false
# The paper's symbols are capitals (R, S, G) and are rebound; autograd.Function types its methods as (*args).

from typing import Any

import torch
from torch import Tensor

from slimgrad.once import differentiable_once

from .parts import (
    PAPER_EPS,
    Features,
    Parts,
    State,
    Values,
    check_query_state,
    plain_sums,
    signed,
    state_dtype,
    without_autocast,
)

block_sums = plain_sums


def attend(q: Features, parts: Parts, before: State, *, eps: float = PAPER_EPS) -> Values:
    """Return y ``[B, T, H, D]`` in v's dtype, given the state before the chunk; one serial step per token.

    Reverse mode once, and forward mode. Raises ValueError where shapes, dtypes or the normaliser do not match.
    """
    check_query_state(q, parts, before)
    R, S = before
    with without_autocast(q):
        dtype = state_dtype(parts.k, parts.v)
        q_, k_, v_ = (x.to(dtype) for x in (q, parts.k, parts.v))
        if S is None:
            return _Scan.apply(q_, k_, v_, R)[0].to(parts.v.dtype)
        ones = v_.new_ones(*v_.shape[:3], 1)
        u, _ = _Scan.apply(q_, k_, torch.cat([v_, ones], -1), torch.cat([R, S.unsqueeze(-1)], -1))
        return (u[..., :-1] / (u[..., -1:] + eps)).to(parts.v.dtype)


def _scan(q: Tensor, k: Tensor, v: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Return u_t = R_t^T q_t ``[B, T, H, D]`` and the state after the last token.

    The state is one block, updated in place, and so are the rows: made token by token between rows that stay, states
    would leave holes of their own size in malloc's heap.
    """
    R, u = R.clone(), v.new_empty(*q.shape[:-1], v.shape[-1])
    for t in range(q.shape[1]):
        R.addcmul_(k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2))
        u[:, t] = (q[:, t].unsqueeze(-2) @ R).squeeze(-2)
    return u, R


def _scan_back(du: Tensor, q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the state before, walking back from the state after the last token."""
    state, G = last.clone(), torch.zeros_like(last)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for t in reversed(range(q.shape[1])):
        q_t, k_t, v_t, du_t = q[:, t], k[:, t], v[:, t], du[:, t]
        G.addcmul_(q_t.unsqueeze(-1), du_t.unsqueeze(-2))
        dq[:, t] = (state @ du_t.unsqueeze(-1)).squeeze(-1)
        dk[:, t] = (G @ v_t.unsqueeze(-1)).squeeze(-1)
        dv[:, t] = (k_t.unsqueeze(-2) @ G).squeeze(-2)
        state.addcmul_(k_t.unsqueeze(-1), v_t.unsqueeze(-2), value=-1)
    return dq, dk, dv, G


@signed
class _Scan(torch.autograd.Function):
    """(q, k, v, R before) -> u, without a normaliser; the last state is an output only so that it can be saved."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        return _scan(q, k, v, R)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, R = inputs
        _, last = output
        ctx.mark_non_differentiable(last)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, last)
        ctx.save_for_forward(q, k, v, R)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, du: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if du is None:
            return None, None, None, None
        q, k, v, last = ctx.saved_tensors
        with without_autocast(q):
            return _scan_back(du, q, k, v, last)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        primals = ctx.saved_for_forward
        q, k, v, R = primals
        dq, dk, dv, dR = (torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True))
        zero = torch.zeros_like(R)
        return _scan(dq, k, v, R)[0] + _scan(q, dk, v, dR)[0] + _scan(q, k, dv, zero)[0], None
