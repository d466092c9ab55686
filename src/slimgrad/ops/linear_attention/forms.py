"""Every form of causal linear attention by name, and the function that runs one whole chunk."""

import logging
from functools import cache

from . import blocked, iterative, prefix_sum, reference
from .parts import PAPER_EPS, Features, Form, State, Values, add_states, plain_sums, zero_state

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("blocked", blocked.block_sums, blocked.attend),
        Form("iterative", iterative.block_sums, iterative.attend),
        Form("prefix_sum", prefix_sum.block_sums, prefix_sum.attend),
        Form("quadratic", plain_sums, reference.attend_quadratic),
        Form("recurrent", plain_sums, reference.attend_recurrent),
    )
}

_log = logging.getLogger("slimgrad.ops")


def get_form(name: str = "auto") -> Form:
    """Return the form of that name: its ``block_sums`` and ``attend``.

    "auto" is "blocked", which is the fastest form on every device and length measured; the log says so once.
    Raises ValueError listing the known names otherwise.
    """
    if name == "auto":
        return _auto()
    if name not in FORMS:
        raise ValueError(f"expected a form of linear attention among {['auto', *FORMS]}; got {name!r}: pass 'auto'")
    return FORMS[name]


@cache
def _auto() -> Form:
    _log.info("linear attention: 'auto' is 'blocked': the fastest form measured, with memory linear in the length")
    return FORMS["blocked"]


def linear_attention(
    q: Features,
    k: Features,
    v: Values,
    state: State | None = None,
    *,
    normalize: bool = True,
    eps: float = PAPER_EPS,
    impl: str = "auto",
    block: int | None = None,
) -> tuple[Values, State]:
    """Return causal linear attention over a chunk, and the state after it.

    y_t = R_t^T q_t / (S_t . q_t + eps), with R_t = R_0 + sum_{j <= t} k_j v_j^T and S_t = S_0 + sum_{j <= t} k_j;
    without ``normalize`` y_t = R_t^T q_t and S is None.

    Shapes: q, k ``[B, T, H, M]`` (after the feature map), v ``[B, T, H, D]``, state ``(R [B, H, M, D], S [B, H, M])``
    or None for zeros; y ``[B, T, H, D]`` in v's dtype. For 16-bit inputs the sums and the state are float32.
    ``impl`` is a name of `get_form`; ``block``, in tokens, is for "blocked" alone. Differentiable in q, k, v and state.
    Raises ValueError for unknown names and for shapes or dtypes that do not match.
    Cost over a sequence of length L: O(L) time and memory, but O(L M D) memory for "prefix_sum" and O(L^2) time and
    memory for "quadratic".

    >>> q, k, v = torch.rand(1, 5, 2, 3), torch.rand(1, 5, 2, 3), torch.rand(1, 5, 2, 4)
    >>> y, (R, S) = linear_attention(q, k, v)
    >>> y.shape, R.shape, S.shape
    (torch.Size([1, 5, 2, 4]), torch.Size([1, 2, 3, 4]), torch.Size([1, 2, 3]))
    """
    form = get_form(impl)
    parts = form.block_sums(k, v, block=block, normalize=normalize)
    before = zero_state(k, v, normalize=normalize) if state is None else state
    return form.attend(q, parts, before, eps=eps), add_states(before, parts.total)
