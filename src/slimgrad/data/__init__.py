"""Text as bytes: corpora, documents, windows, batches. Nothing is shipped, nothing is copied into memory whole."""

from slimgrad.data.batches import Batch, Order, copying_batches, text_batches
from slimgrad.data.corpus import KNOWN, Corpus, Split, load_corpus, map_file
from slimgrad.data.documents import Documents
from slimgrad.data.fetch import fetch
from slimgrad.data.pydocs import pydocs
from slimgrad.data.windows import consecutive_windows, shuffled_starts

__all__ = [
    "KNOWN",
    "Batch",
    "Corpus",
    "Documents",
    "Order",
    "Split",
    "consecutive_windows",
    "copying_batches",
    "fetch",
    "load_corpus",
    "map_file",
    "pydocs",
    "shuffled_starts",
    "text_batches",
]
