"""Causal linear attention in blocks, with a hand-written backward pass: the default form.

Within a block of c tokens a masked matrix product, across blocks the running state (R, S) before the block:

    num_t = R^T q_t + sum_{j <= t, in block} (q_t . k_j) v_j          y_t = num_t / den_t
    den_t = S . q_t + sum_{j <= t, in block}  q_t . k_j + eps         (without the normaliser y_t = num_t)

The backward pass (derived in README.md beside this file) runs over the blocks twice: states come from a prefix sum, as
in the forward pass, and the gradients of k and v from a *suffix* sum of q_t dnum_t^T. Nothing is subtracted, so nothing
cancels. The glossary is in `parts`.

**Memory.** Saved for backward: q, k, v, y, one denominator per token and head, and the state before: per token and head
2 M + 2 D + 1 numbers (2 M + D without the normaliser), plus M (D + 1) per head once. Neither the masked scores nor the
states of the blocks are kept. They are computed again, a group of blocks at a time, so temporaries besides the
gradients are a fixed number of groups, and one state per group. `block_sums` holds T / c block sums (as large as k
when c = D), until its `Parts` is dropped.

**Time.** FLOPs per token and head: forward 2 (c M + c D + 2 M D), backward 2 (3 c M + 2 c D + 5 M D), and 4 M D more
where the totals take gradients. Serial steps over time: T / c additions of a state.

**Measured** (two threads of an AVX-512 CPU, float32, B = 1, M = D = 64, H = 8 and 16, T = 256, 1024, 8192; forward and
backward; best of many runs, repeatable to about 10%):

- Contiguous copies of a *group* of blocks, all its blocks and heads in one batched product, won. One batched product
  per block on strided views, without copies, took 1.15 to 1.6 times as long: a copy costs a tenth of a product, and the
  small operations come once per block instead of once per group.
- Groups of 64 matrices (256 tokens at H = 16) were best or level. Groups four times larger took up to 1.7 times as
  long at H = 16, as their scores leave the cache.
- Blocks of 64 won; 32 took 1.03 to 1.3 times as long and doubles the states; 128 took 1.1 to 1.4 times, as more of
  each masked product is thrown away.
- A column of ones appended to v, which would give the denominator for free, lost: products 65 wide take 1.2 times as
  long as those 64 wide.
- A batched product with one output column takes 7 times as long as one with one output row: hence `_dot`.
"""

# pyright: reportConstantRedefinition=false, reportIncompatibleMethodOverride=false
# The paper's symbols are capitals (R, S, G) and are rebound; autograd.Function types its methods as (*args).

from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimgrad.once import differentiable_once

from .parts import (
    PAPER_EPS,
    Features,
    Parts,
    State,
    Values,
    check_block,
    check_keys_values,
    check_query_state,
    signed,
    state_dtype,
    without_autocast,
)

DEFAULT_BLOCK = 64  # tokens; measured, see above
GROUP_MATRICES = 64  # blocks times heads in one batched product; measured, see above


def block_sums(k: Features, v: Values, *, block: int | None = None, normalize: bool = True) -> Parts:
    """Sum k v^T (and k) over the chunk, and over each of its blocks.

    Shapes: k ``[B, T, H, M]``, v ``[B, T, H, D]``; ``total`` is ``(R [B, H, M, D], S [B, H, M])``, with S None when
    ``normalize`` is False; differentiable in k and v. ``block`` is in tokens (None: `DEFAULT_BLOCK`); T need not be a
    multiple. The bits of ``total`` depend on k, v and block alone: not on grad mode, nor on whether `attend` follows.
    Raises ValueError on wrong shapes, integer inputs, or block < 1. Cost: O(T M D) time, O(T M D / block) memory.
    """
    check_keys_values(k, v)
    c = check_block(block, DEFAULT_BLOCK)
    R, R_blocks, *rest = _Sums.apply(k, v, c, normalize)
    S, S_blocks = rest or (None, None)
    return Parts(k=k, v=v, total=(R, S), blocks=(R_blocks, S_blocks), block=c)


def attend(q: Features, parts: Parts, before: State, *, eps: float = PAPER_EPS) -> Values:
    """Return y ``[B, T, H, D]`` in v's dtype, given the state before the chunk.

    ``before`` has the shapes and dtype of ``parts.total`` and takes gradients; ``eps`` is added to the denominator
    (unused without the normaliser). Raises ValueError where shapes, dtypes or the normaliser do not match. Reverse
    mode once and forward mode; a second reverse differentiation raises.
    Cost: O(T (block + D) M) time; memory as in the head of this module.
    """
    check_query_state(q, parts, before)
    if parts.blocks is None:
        raise ValueError("expected parts with block sums; got parts of another form: use this form's own block_sums")
    outputs = _Attend.apply(q, parts.k, parts.v, *before, *parts.blocks, eps, parts.block)
    return (outputs[0] if isinstance(outputs, tuple) else outputs).to(parts.v.dtype)


class _Group(NamedTuple):
    """Consecutive blocks of equal size, computed in one batched product."""

    start: int  # token
    stop: int  # token
    num_blocks: int
    first: int  # block


def _groups(x: Tensor, block: int) -> list[_Group]:
    """Cut the time axis: full groups, then the blocks that are left, then the tokens that are left as a short block."""
    B, T, H, _ = x.shape
    per_group = max(1, GROUP_MATRICES // (B * H))
    full = T // block
    groups = [
        _Group(i * block, min(i + per_group, full) * block, min(per_group, full - i), i)
        for i in range(0, full, per_group)
    ]
    return groups if full * block == T else [*groups, _Group(full * block, T, 1, full)]


def _rows(x_BTHX: Tensor, group: _Group) -> Tensor:
    """View a group's tokens as [blocks, B, H, c, X]; those of one block as [B, H, c, X]."""
    B, T, H, X = x_BTHX.shape
    start, stop, n, _ = group
    here = x_BTHX if stop - start == T else x_BTHX[:, start:stop]
    if n == 1:
        return here.transpose(1, 2)
    return here.view(B, n, (stop - start) // n, H, X).permute(1, 0, 3, 2, 4)


def _fold(x_BTHX: Tensor, group: _Group, dtype: torch.dtype) -> Tensor:
    """A group's tokens as [blocks * B * H, c, X] in the working dtype, to read: a copy; one block of B = 1 a view."""
    rows = _rows(x_BTHX, group).to(dtype)
    return rows.reshape(-1, *rows.shape[-2:])


def _running(first: Tensor, parts: Tensor, *, backwards: bool = False) -> Tensor:
    """Return for each part ``first`` plus the sum of the parts before it (after it)."""
    if len(parts) == 1:
        return first.unsqueeze(0)
    sums = torch.empty_like(parts)
    ordered, slots = list(parts.unbind(0)), list(sums.unbind(0))
    if backwards:
        ordered.reverse()
        slots.reverse()
    slots[0].copy_(first)
    for i in range(1, len(slots)):
        torch.add(slots[i - 1], ordered[i - 1], out=slots[i])
    return sums


def _after(last: Tensor | None, parts: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return for each part ``last`` plus the sum of the parts after it (None: nothing), and the whole sum."""
    if last is None and len(parts) == 1:
        return None, parts[0]
    after = _running(torch.zeros_like(parts[0]) if last is None else last, parts, backwards=True)
    return after.view(-1, *parts.shape[2:]), after[0] + parts[0]


def _dot(x_bcM: Tensor, s_bM: Tensor) -> Tensor:
    """Return x_t . s for each row as [b, c, 1]: one output row, as one output column is slow in a batched product."""
    return torch.bmm(s_bM.unsqueeze(1), x_bcM.mT).mT


@signed
class _Sums(torch.autograd.Function):
    """(k, v) -> R, R of each block (detached), and with the normaliser S, S of each block (detached)."""

    @staticmethod
    def forward(k: Tensor, v: Tensor, block: int, normalize: bool) -> tuple[Tensor, ...]:
        (B, T, H, M), D = k.shape, v.shape[-1]
        n, dtype = -(-T // block), state_dtype(k, v)
        R_nNMD = torch.empty(n, B * H, M, D, dtype=dtype, device=k.device)
        S_nNM = torch.empty(n, B * H, M, dtype=dtype, device=k.device)
        with without_autocast(k):
            for group in _groups(k, block):
                k_bcM, v_bcD = _fold(k, group, dtype), _fold(v, group, dtype)
                here = slice(group.first, group.first + group.num_blocks)
                torch.bmm(k_bcM.mT, v_bcD, out=R_nNMD[here].view(-1, M, D))
                if normalize:
                    torch.sum(k_bcM, 1, out=S_nNM[here].view(-1, M))
            R_BHMD = R_nNMD.sum(0).view(B, H, M, D)
            if not normalize:
                return R_BHMD, R_nNMD
            return R_BHMD, R_nNMD, S_nNM.sum(0).view(B, H, M), S_nNM

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        k, v, _, ctx.normalize = inputs
        ctx.mark_non_differentiable(*output[1::2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(k, v)
        ctx.save_for_forward(k, v)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        k, v = ctx.saved_tensors
        (B, _, H, M), D = k.shape, v.shape[-1]
        dR_BHMD, dS_BHM = grads[0], grads[2] if ctx.normalize else None
        if dR_BHMD is None and dS_BHM is None:
            return None, None, None, None
        dR_NMD = k.new_zeros(B * H, M, D, dtype=state_dtype(k, v)) if dR_BHMD is None else dR_BHMD.reshape(B * H, M, D)
        dS_N1M = None if dS_BHM is None else dS_BHM.reshape(B * H, 1, M)
        needs_k, needs_v, *_ = ctx.needs_input_grad
        with without_autocast(k):
            dk = _row_products(v, dR_NMD.mT, dS_N1M, k) if needs_k else None
            dv = _row_products(k, dR_NMD, None, v) if needs_v else None
        return dk, dv, None, None

    @staticmethod
    def jvp(ctx: Any, k_t: Tensor | None, v_t: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        k, v = ctx.saved_for_forward
        dtype = state_dtype(k, v)
        k_t, v_t = _or_zeros(k_t, k), _or_zeros(v_t, v)
        with without_autocast(k):
            k_BHTM, v_BHTD, dk_BHTM, dv_BHTD = (x.transpose(1, 2).to(dtype) for x in (k, v, k_t, v_t))
            R_t = dk_BHTM.mT @ v_BHTD + k_BHTM.mT @ dv_BHTD
            return (R_t, None, dk_BHTM.sum(2), None) if ctx.normalize else (R_t, None)


def _row_products(x: Tensor, A_NXY: Tensor, b_N1Y: Tensor | None, like: Tensor) -> Tensor:
    """Return x_t A + b for each row, laid out as ``like``; a group of tokens at a time, while they are in the cache."""
    out = torch.empty_like(like)
    for group in _groups(x, DEFAULT_BLOCK):
        whole = group._replace(num_blocks=1)
        rows = _rows(x, whole)
        product = torch.bmm(rows.reshape(-1, *rows.shape[-2:]).to(A_NXY.dtype), A_NXY)
        if b_N1Y is not None:
            product += b_N1Y
        out_rows = _rows(out, whole)
        out_rows.copy_(product.view(out_rows.shape))
    return out


@signed
class _Attend(torch.autograd.Function):
    """(q, k, v, before) -> y in the sums' dtype, and with the normaliser the denominators [B, T, H, 1] (detached).

    y is cast outside: its saved rows enter the gradient of the denominator, where 16 bits are not enough.
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        R: Tensor,
        S: Tensor | None,
        R_nNMD: Tensor,
        S_nNM: Tensor | None,
        eps: float,
        block: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        (B, T, H, M), D = q.shape, v.shape[-1]
        R_NMD, S_NM = R.reshape(B * H, M, D), None if S is None else S.reshape(B * H, M)
        y = torch.empty(B, T, H, D, dtype=R.dtype, device=v.device)
        den = None if S is None else torch.empty(B, T, H, 1, dtype=R.dtype, device=v.device)
        with without_autocast(q):
            groups = _groups(q, block)
            for group in groups:
                q_bcM, k_bcM, v_bcD = (_fold(x, group, R.dtype) for x in (q, k, v))
                R_here = R_nNMD[group.first : group.first + group.num_blocks]
                R_before = _running(R_NMD, R_here)
                P_bcc = torch.bmm(q_bcM, k_bcM.mT).tril_()
                num_bcD = torch.bmm(q_bcM, R_before.view(-1, M, D)).baddbmm_(P_bcc, v_bcD)
                y_rows, is_last = _rows(y, group), group is groups[-1]
                R_NMD = R_NMD if is_last else R_before[-1] + R_here[-1]
                if den is None or S_NM is None or S_nNM is None:
                    y_rows.copy_(num_bcD.view(y_rows.shape))
                    continue
                S_here = S_nNM[group.first : group.first + group.num_blocks]
                S_before, den_rows = _running(S_NM, S_here), _rows(den, group)
                S_NM = S_NM if is_last else S_before[-1] + S_here[-1]
                den_bc1 = P_bcc.sum(-1, keepdim=True).add_(_dot(q_bcM, S_before.view(-1, M))).add_(eps)
                den_rows.copy_(den_bc1.view(den_rows.shape))
                torch.div(num_bcD.view(y_rows.shape), den_bc1.view(den_rows.shape), out=y_rows)
        return y if den is None else (y, den)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, R, S, _, _, _, ctx.block = inputs
        y, den = output if isinstance(output, tuple) else (None, None)
        if den is not None:
            ctx.mark_non_differentiable(den)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, R, S, y, den)
        ctx.save_for_forward(q, k, v, R, S, y, den)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        with without_autocast(dy):
            return *_attend_backward(dy, ctx.saved_tensors, ctx.block), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | tuple[Tensor, None]:
        *primals, y, den = ctx.saved_for_forward
        with without_autocast(primals[0]):
            num_t, den_t = _tangents(tuple(primals), tangents[:5], ctx.block)
            return num_t if y is None else ((num_t - y * den_t) / den, None)


def _states_before_groups(k: Tensor, v: Tensor, R: Tensor, S: Tensor | None, groups: list[_Group]) -> list[State]:
    """Return the state before each group, [B*H, M, D] and [B*H, M]: the forward prefix, computed again."""
    B, H, M, D = R.shape
    R_NMD, S_NM = R.reshape(B * H, M, D), None if S is None else S.reshape(B * H, M)
    states: list[State] = [(R_NMD, S_NM)]
    for group in groups[:-1]:
        whole = group._replace(num_blocks=1)
        k_NgM, v_NgD = _fold(k, whole, R.dtype), _fold(v, whole, R.dtype)
        R_NMD = torch.baddbmm(R_NMD, k_NgM.mT, v_NgD)
        S_NM = None if S_NM is None else S_NM + k_NgM.sum(1)
        states.append((R_NMD, S_NM))
    return states


def _attend_backward(dy: Tensor, saved: tuple[Any, ...], block: int) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, R and S; equations (5) to (9) of README.md."""
    q, k, v, R, S, y, den = saved
    (B, H, M, D), dtype = R.shape, R.dtype
    groups = _groups(q, block)
    states = _states_before_groups(k, v, R, S, groups)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    G_NMD: Tensor | None = None  # what comes from later groups
    g_NM: Tensor | None = None
    for group, (R_NMD, S_NM) in zip(reversed(groups), reversed(states), strict=True):
        n, shape = group.num_blocks, _rows(q, group).shape[:-1]
        q_bcM, k_bcM, v_bcD, e_bcD = (_fold(x, group, dtype) for x in (q, k, v, dy))
        w_bc1 = None
        if den is not None:
            e_bcD = e_bcD / _fold(den, group, dtype)
            w_bc1 = (_fold(y, group, dtype) * e_bcD).sum(-1, keepdim=True).neg_()
        R_before = R_NMD if n == 1 else _running(R_NMD, torch.bmm(k_bcM.mT, v_bcD).view(n, -1, M, D)).view(-1, M, D)
        G_here = torch.bmm(q_bcM.mT, e_bcD).view(n, -1, M, D)
        G_after, G_NMD = _after(G_NMD, G_here)
        P_bcc = torch.bmm(q_bcM, k_bcM.mT).tril_()
        dv_bcD = torch.bmm(P_bcc.mT, e_bcD)
        if w_bc1 is None:
            dP_bcc = torch.bmm(e_bcD, v_bcD.mT).tril_()
        else:
            dP_bcc = torch.baddbmm(w_bc1.expand_as(P_bcc), e_bcD, v_bcD.mT).tril_()
        dq_bcM = torch.bmm(dP_bcc, k_bcM).baddbmm_(e_bcD, R_before.mT)
        dk_bcM = torch.bmm(dP_bcc.mT, q_bcM)
        if G_after is not None:
            dv_bcD.baddbmm_(k_bcM, G_after)
            dk_bcM.baddbmm_(v_bcD, G_after.mT)
        if w_bc1 is not None and S_NM is not None:
            S_before = S_NM if n == 1 else _running(S_NM, k_bcM.sum(1).view(n, -1, M))
            g_after, g_NM = _after(g_NM, torch.bmm(w_bc1.mT, q_bcM).view(n, -1, M))
            dq_bcM.addcmul_(w_bc1, S_before.view(-1, 1, M))
            if g_after is not None:
                dk_bcM.add_(g_after.view(-1, 1, M))
        _rows(dq, group).copy_(dq_bcM.view(*shape, M))
        _rows(dk, group).copy_(dk_bcM.view(*shape, M))
        _rows(dv, group).copy_(dv_bcD.view(*shape, D))
    assert G_NMD is not None
    return dq, dk, dv, G_NMD.view(B, H, M, D), None if g_NM is None else g_NM.view(B, H, M)


def _or_zeros(tangent: Tensor | None, primal: Tensor) -> Tensor:
    return torch.zeros_like(primal) if tangent is None else tangent


def _tangents(
    primals: tuple[Any, ...], tangents: tuple[Tensor | None, ...], block: int
) -> tuple[Tensor, Tensor | None]:
    """Return the tangents of numerator and denominator by the product rule, block by block."""
    R, S = primals[3:]
    R_t, S_t = _or_zeros(tangents[3], R), None if S is None else _or_zeros(tangents[4], S)
    doubled = [x for primal, t in zip(primals[:3], tangents[:3], strict=True) for x in (primal, _or_zeros(t, primal))]
    nums: list[Tensor] = []
    dens: list[Tensor] = []
    for pieces in zip(*(x.split(block, 1) for x in doubled), strict=True):
        q_b, dq_b, k_b, dk_b, v_b, dv_b = (x.transpose(1, 2).to(R.dtype) for x in pieces)
        P = (q_b @ k_b.mT).tril()
        dP = (dq_b @ k_b.mT + q_b @ dk_b.mT).tril()
        nums.append(dP @ v_b + P @ dv_b + dq_b @ R + q_b @ R_t)
        R_t = R_t + dk_b.mT @ v_b + k_b.mT @ dv_b
        R = R + k_b.mT @ v_b
        if S is not None and S_t is not None:
            dens.append(dP.sum(-1, keepdim=True) + dq_b @ S.unsqueeze(-1) + q_b @ S_t.unsqueeze(-1))
            S, S_t = S + k_b.sum(2), S_t + dk_b.sum(2)
    return torch.cat(nums, 2).transpose(1, 2), torch.cat(dens, 2).transpose(1, 2) if dens else None
