"""Training a Performer on bytes: a configuration, a loop that survives, evaluation, generation."""

from slimgrad.extras import require_extra
from slimgrad.lazy import lazily

require_extra("train", "slimgrad.bytelm")

__getattr__, __dir__, __all__ = lazily(__name__)
