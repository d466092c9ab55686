"""Whole models of each kind of state, built on `ops` and `states`, and shapes of Performers by name."""

from slimgrad.lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__)
