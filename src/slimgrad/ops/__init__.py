"""Mathematics on tensors, one folder per recurrence; needs torch and nothing else of this package."""

from .feature_maps import FEATURE_MAPS, FeatureMap, draw_projection, get_feature_map
from .linear_attention import Form, Parts, State, get_form, linear_attention, zero_state

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "Form",
    "Parts",
    "State",
    "draw_projection",
    "get_feature_map",
    "get_form",
    "linear_attention",
    "zero_state",
]
