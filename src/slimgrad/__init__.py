"""slimgrad: exact gradients of causal sequence models over sequences of any length, in the memory you state.

import slimgrad as sg
result = sg.backward(model, tokens, chunk=4096)    # parameter gradients are in .grad
"""

from __future__ import annotations

from slimgrad.lazy import lazily

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazily(__name__)
