"""Causal linear attention by a prefix sum laid out over time: the paper's parallel form.

    R_t = R_0 + cumsum(k_t v_t^T),   S_t = S_0 + cumsum(k_t),   y_t = R_t^T q_t / (S_t . q_t + eps)

Every state is held at once, in plain autograd: O(log T) parallel steps on a machine wide enough, O(T M D) work, and
O(T M D) memory, D or M times that of the other forms. For the paper's experiments. The glossary is in `parts`.
Forward mode and derivatives of any order: torch's own. Source: the paper, section 3, the parallel prefix sum.
"""

from .parts import (
    PAPER_EPS,
    Features,
    Parts,
    State,
    Values,
    check_query_state,
    plain_sums,
    state_dtype,
    without_autocast,
)

block_sums = plain_sums


def attend(q: Features, parts: Parts, before: State, *, eps: float = PAPER_EPS) -> Values:
    """Return y ``[B, T, H, D]`` in v's dtype, given the state before the chunk; O(T M D) memory.

    Raises ValueError where shapes, dtypes or the normaliser do not match.
    """
    check_query_state(q, parts, before)
    R, S = before
    with without_autocast(q):
        q_, k_, v_ = (x.to(state_dtype(parts.k, parts.v)) for x in (q, parts.k, parts.v))
        R_BTHMD = (k_.unsqueeze(-1) * v_.unsqueeze(-2)).cumsum(1) + R.unsqueeze(1)
        num = (q_.unsqueeze(-2) @ R_BTHMD).squeeze(-2)
        if S is not None:
            num = num / ((q_ * (k_.cumsum(1) + S.unsqueeze(1))).sum(-1, keepdim=True) + eps)
        return num.to(parts.v.dtype)
