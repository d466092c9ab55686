"""Text as bytes: corpora, documents, windows, batches. Nothing is shipped, nothing large is in memory whole."""

from slimgrad.data.batches import Batch, Order, Sequences, copying_batches, text_batches, whole
from slimgrad.data.corpus import END, KNOWN, SPREAD, Corpus, Split, as_share, load_corpus, map_file, open_file
from slimgrad.data.documents import Documents, FileBytes, Windows
from slimgrad.data.fetch import fetch
from slimgrad.data.pydocs import pydocs
from slimgrad.data.reading import Format, Reading
from slimgrad.data.windows import consecutive_starts, shuffled_starts

__all__ = [
    "END",
    "KNOWN",
    "SPREAD",
    "Batch",
    "Corpus",
    "Documents",
    "FileBytes",
    "Format",
    "Order",
    "Reading",
    "Sequences",
    "Split",
    "Windows",
    "as_share",
    "consecutive_starts",
    "copying_batches",
    "fetch",
    "load_corpus",
    "map_file",
    "open_file",
    "pydocs",
    "shuffled_starts",
    "text_batches",
    "whole",
]
