"""Every form of causal linear attention by name, and the function that runs one whole."""

import logging
from functools import cache

from . import blocked
from .parts import PAPER_EPS, Features, Form, State, Values, advance, zero_state

FORMS: dict[str, Form] = {"blocked": Form("blocked", blocked.block_sums, blocked.attend)}

_log = logging.getLogger("slimgrad.ops")


def get_form(name: str = "auto") -> Form:
    """Return the form of that name; "auto" is blocked, and says so once in the log."""
    if name == "auto":
        return _auto()
    if name not in FORMS:
        raise ValueError(
            f"expected a form of linear attention among {['auto', *FORMS]}; got {name!r}: pass impl='auto'"
        )
    return FORMS[name]


@cache
def _auto() -> Form:
    _log.info("linear attention: impl='auto' is 'blocked': fastest form measured, and memory linear in the length")
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
    """Return causal linear attention over the chunk, and the state after it."""
    form = get_form(impl)
    parts = form.block_sums(k, v, block=block, normalize=normalize)
    before = zero_state(k, v, normalize=normalize) if state is None else state
    return form.attend(q, parts, before, eps=eps), advance(before, parts.total)
