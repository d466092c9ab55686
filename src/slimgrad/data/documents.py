"""Several documents as one run of bytes: read anywhere, cut anywhere, copied only across an edge."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from slimgrad.errors import InputError

_HASHED_AT_ONCE = 1 << 20


class Documents:
    """Bytes of one or several documents in order; each a uint8 tensor `[bytes]`, memory-mapped where it is a file.

    Raises:
        InputError: there is no document, or one is empty.
    """

    def __init__(self, documents: Iterable[Tensor]) -> None:
        self.documents = tuple(documents)
        if not self.documents or any(len(document) == 0 for document in self.documents):
            raise InputError("expected at least one document, and none that is empty")
        self._ends = list(itertools.accumulate(len(document) for document in self.documents))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` of the concatenation: a view where one document holds them, else a copy."""
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"expected 0 <= start <= stop <= {len(self):,}, got {start:,} and {stop:,}")
        pieces: list[Tensor] = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            document, end = self.documents[index], self._ends[index]
            offset = end - len(document)
            pieces.append(document[start - offset : min(stop, end) - offset])
            start, index = min(stop, end), index + 1
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if pieces else self.documents[0][:0]

    def cut(self, at: int) -> tuple[Documents, Documents]:
        """The bytes before `at`, and those from there on; a document across the cut becomes two."""
        if not 0 < at < len(self):
            raise InputError(f"expected a cut within the {len(self):,} bytes, got {at:,}")
        before: list[Tensor] = []
        after: list[Tensor] = []
        for document, end in zip(self.documents, self._ends, strict=True):
            inside = min(max(at - (end - len(document)), 0), len(document))
            before.extend([document[:inside]] if inside else [])
            after.extend([document[inside:]] if inside < len(document) else [])
        return Documents(before), Documents(after)

    def sha256(self) -> str:
        """Of the concatenation, read piece by piece."""
        digest = hashlib.sha256()
        for document in self.documents:
            for piece in document.split(_HASHED_AT_ONCE):
                digest.update(piece.numpy().data)
        return digest.hexdigest()
