"""Causal linear attention: y_t = R_t^T q_t / (S_t . q_t), with R and S prefix sums of k v^T and k.

`linear_attention` runs a chunk whole; `get_form` gives its two halves (`parts` says why there are two). README.md has
the derivation, and what each form costs.
"""

from .forms import FORMS, get_form, linear_attention
from .parts import Form, Parts, State, add_states, zero_state

__all__ = ["FORMS", "Form", "Parts", "State", "add_states", "get_form", "linear_attention", "zero_state"]
