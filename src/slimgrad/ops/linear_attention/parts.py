"""What a chunk contributes to the state, and the checks that every form of causal linear attention shares.

Causal linear attention is split in two, so that whoever owns the state can stand in the middle:

    parts = block_sums(k, v)              # the chunk's own contribution: needs no state
    following = before + parts.total      # the caller's business: a plain sum, an exact accumulator, ...
    y = attend(q, parts, before)          # the outputs: need the state before the chunk

==========  ============  ============  ================================================================
symbol      name          shape         meaning (paper, section 2)
==========  ============  ============  ================================================================
g(q), g(k)  q, k          [B, T, H, M]  queries and keys, *after* the feature map
v           v             [B, T, H, D]  values
R           R, total[0]   [B, H, M, D]  prefix sum of g(k_l) v_l^T (the transpose of the paper's matrix)
S           S, total[1]   [B, H, M]     prefix sum of g(k_l); None without the normaliser
==========  ============  ============  ================================================================

B batch, T time within the chunk, H heads, M features, D width of a value (the paper's d).

Source: "Sub-Linear Memory: How to Make Performers SLiM", NeurIPS 2021, sections 2 and 3.
"""

import contextlib
import inspect
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Features: TypeAlias = Float[Tensor, "batch time heads features"]
Values: TypeAlias = Float[Tensor, "batch time heads width"]
StateR: TypeAlias = Float[Tensor, "batch heads features width"]
StateS: TypeAlias = Float[Tensor, "batch heads features"]
State: TypeAlias = tuple[StateR, StateS | None]

PAPER_EPS = 1e-16  # what the paper's published code adds to the denominator


@dataclass(frozen=True, slots=True)
class Parts:
    """A chunk's keys, values and their sums; made by ``block_sums``, spent by ``attend``."""

    k: Features
    v: Values
    total: State  # (sum of k v^T, sum of k or None); differentiable in k and v; float32 for 16-bit inputs
    blocks: State | None  # per-block sums, detached, [blocks, B*H, M, D] and [blocks, B*H, M]; None: the form has none
    block: int  # tokens per block; 0 where the form has no blocks


class BlockSums(Protocol):
    """``block_sums`` of any form."""

    def __call__(self, k: Features, v: Values, *, block: int | None = None, normalize: bool = True) -> Parts:
        """Return the chunk's own contribution to the state."""
        ...


class Attend(Protocol):
    """``attend`` of any form."""

    def __call__(self, q: Features, parts: Parts, before: State, *, eps: float = PAPER_EPS) -> Values:
        """Return the outputs of the chunk, given the state before it."""
        ...


@dataclass(frozen=True, slots=True)
class Form:
    """One way to compute causal linear attention: two functions that share their `Parts`."""

    name: str
    block_sums: BlockSums
    attend: Attend


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which sums over time are kept: float64 if any input is, else float32."""
    return torch.float64 if any(x.dtype is torch.float64 for x in tensors) else torch.float32


def zero_state(k: Features, v: Values, *, normalize: bool = True) -> State:
    """Return the state before the first token: exact zeros, on k's device, in the dtype of the sums."""
    B, _, H, M = k.shape
    R_BHMD = torch.zeros(B, H, M, v.shape[-1], dtype=state_dtype(k, v), device=k.device)
    return R_BHMD, R_BHMD.new_zeros(B, H, M) if normalize else None


def add_states(before: State, total: State) -> State:
    """Return ``before + total``: the state after the chunk, where nobody needs it to go back exactly."""
    R, S = before
    dR, dS = total
    return R + dR, None if S is None or dS is None else S + dS


def plain_sums(k: Features, v: Values, *, block: int | None = None, normalize: bool = True) -> Parts:
    """Sum k v^T and k over the chunk with plain operations: ``block_sums`` of the forms that have no blocks.

    Raises ValueError on wrong shapes, and where a block size is given. Cost: O(T M D) time, O(M D) memory.
    """
    check_keys_values(k, v)
    if block is not None:
        raise ValueError(f"expected block=None, as only the blocked form has blocks; got {block!r}: drop it")
    with without_autocast(k):
        k_BHTM, v_BHTD = (x.transpose(1, 2).to(state_dtype(k, v)) for x in (k, v))
        total = (k_BHTM.mT @ v_BHTD, k_BHTM.sum(2) if normalize else None)
    return Parts(k=k, v=v, total=total, blocks=None, block=0)


def signed(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A class decorator: the signature of `forward`, which torch asks for at each call, noted once.

    It asks where there is a `setup_context`; inspect takes as long as two products.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # pyright: ignore[reportFunctionMemberAccess]
    return function


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off where it is on: sums over a long time axis must not be rounded to 16 bits."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def check_keys_values(k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless k is [B, T, H, M] and v is [B, T, H, D], floating, with at least one token."""
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[1] == 0:
        raise ValueError(
            f"expected k [batch, time, heads, features] and v [batch, time, heads, width] with equal batch, time and "
            f"heads and at least one token; got k {list(k.shape)} and v {list(v.shape)}: "
            f"put time second and heads third, and skip empty chunks"
        )
    if not (k.is_floating_point() and v.is_floating_point()):
        raise ValueError(f"expected floating k and v; got k {k.dtype} and v {v.dtype}: cast them first")


def check_query_state(q: Tensor, parts: Parts, before: State) -> None:
    """Raise ValueError unless q has k's shape and ``before`` has the shapes and dtype of ``parts.total``."""
    if q.shape != parts.k.shape or not q.is_floating_point():
        raise ValueError(
            f"expected floating q of k's shape {list(parts.k.shape)}; got q {list(q.shape)} {q.dtype}: "
            f"apply one feature map to both, and take both from the same chunk"
        )
    for name, have, want in zip("RS", before, parts.total, strict=True):
        if have is None and want is None:
            continue
        if have is None or want is None:
            raise ValueError(
                f"expected {name} of the state before to be {'a tensor' if have is None else 'None'}; got "
                f"{'None' if have is None else list(have.shape)}: call block_sums with the same normalize= as the "
                f"state was made with"
            )
        if have.shape != want.shape or have.dtype is not want.dtype:
            raise ValueError(
                f"expected {name} of the state before to be {list(want.shape)} {want.dtype}; got {list(have.shape)} "
                f"{have.dtype}: start from zero_state(k, v), and keep sums of 16-bit inputs in float32"
            )


def check_block(block: int | None, default: int) -> int:
    """Return the block size to use; raise ValueError unless it is None or a positive integer."""
    if block is None:
        return default
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"expected block to be None or a positive number of tokens; got {block!r}: try 64 or 128")
    return block
