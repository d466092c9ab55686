"""Text as bytes: corpora, a split, windows. Nothing is shipped, fetched or copied into memory whole."""

from slimgrad.data.corpus import Corpus, load_corpus, map_file, pydocs
from slimgrad.data.windows import consecutive_windows, shuffled_starts, split_bytes

__all__ = [
    "Corpus",
    "consecutive_windows",
    "load_corpus",
    "map_file",
    "pydocs",
    "shuffled_starts",
    "split_bytes",
]
