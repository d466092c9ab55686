"""Causal linear attention."""

from .blocked import attend, block_sums
from .parts import Form, Parts, State, advance, zero_state
from .forms import FORMS, get_form, linear_attention

__all__ = [
    "FORMS",
    "Form",
    "Parts",
    "State",
    "advance",
    "attend",
    "block_sums",
    "get_form",
    "linear_attention",
    "zero_state",
]
