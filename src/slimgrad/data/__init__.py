"""Text as bytes: corpora, documents, windows, batches. Nothing is shipped, nothing large is in memory whole."""

from slimgrad.lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__)
