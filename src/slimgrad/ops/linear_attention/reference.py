"""Causal linear attention, specified twice: as a masked [T, T] product, and as a recurrence over tokens.

    quadratic:  y = (tril(Q K^T) V + Q R) / (tril(Q K^T) 1 + Q S + eps)
    recurrent:  R_t = R_{t-1} + k_t v_t^T,  S_t = S_{t-1} + k_t,  y_t = R_t^T q_t / (S_t . q_t + eps)

Without the normaliser (S None) the denominator is 1. Both run in plain autograd, through the initial and the final
state, forward mode included. They are what every other form is tested against; the glossary is in `parts`.
Cost: quadratic O(T^2 (M + D)) time and O(T^2) memory per head; recurrent O(T M D) both.
Source: the paper, section 2, equations for causal attention by prefix sums.
"""

# pyright: reportConstantRedefinition=false
# The paper's symbols are capitals (R, S) and are rebound.

import torch
from torch import Tensor

from .parts import PAPER_EPS, Features, Parts, State, Values, check_query_state, state_dtype, without_autocast


def quadratic(q: Features, k: Features, v: Values, before: State, eps: float = PAPER_EPS) -> tuple[Values, State]:
    """Return y and the state after, from the masked matrix of scores."""
    R, S = before
    q_, k_, v_ = (x.transpose(1, 2).to(state_dtype(k, v)) for x in (q, k, v))
    P_BHTT = (q_ @ k_.mT).tril()
    num = P_BHTT @ v_ + q_ @ R
    after = (R + k_.mT @ v_, None if S is None else S + k_.sum(2))
    if S is not None:
        num = num / (P_BHTT.sum(-1, keepdim=True) + q_ @ S.unsqueeze(-1) + eps)
    return num.transpose(1, 2).to(v.dtype), after


def step(q_BHM: Tensor, k_BHM: Tensor, v_BHD: Tensor, before: State, eps: float = PAPER_EPS) -> tuple[Tensor, State]:
    """Return y ``[B, H, D]`` of one token and the state after it."""
    R, S = before
    R = R + k_BHM.unsqueeze(-1) * v_BHD.unsqueeze(-2)
    num = (q_BHM.unsqueeze(-1) * R).sum(-2)
    if S is None:
        return num, (R, None)
    S = S + k_BHM
    return num / ((q_BHM * S).sum(-1, keepdim=True) + eps), (R, S)


def recurrent(q: Features, k: Features, v: Values, before: State, eps: float = PAPER_EPS) -> tuple[Values, State]:
    """Return y and the state after, one `step` per token."""
    state, rows = before, list[Tensor]()
    q_, k_, v_ = (x.to(state_dtype(k, v)).unbind(1) for x in (q, k, v))
    for q_t, k_t, v_t in zip(q_, k_, v_, strict=True):
        y_t, state = step(q_t, k_t, v_t, state, eps)
        rows.append(y_t)
    return torch.stack(rows, 1).to(v.dtype), state


def attend_quadratic(q: Features, parts: Parts, before: State, *, eps: float = PAPER_EPS) -> Values:
    """Return y of `quadratic`, as the second half of a form."""
    check_query_state(q, parts, before)
    with without_autocast(q):
        return quadratic(q, parts.k, parts.v, before, eps)[0]


def attend_recurrent(q: Features, parts: Parts, before: State, *, eps: float = PAPER_EPS) -> Values:
    """Return y of `recurrent`, as the second half of a form."""
    check_query_state(q, parts, before)
    with without_autocast(q):
        return recurrent(q, parts.k, parts.v, before, eps)[0]
